"""Made results, sample files and tasks of the suites whose data lives on the hub only."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

from ra3_megatron.evaluate.data import Tasks
from ra3_megatron.evaluate.results import FORMAT, mode_facts, suite_facts
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.suites import SUITES


def tasks(count: int = 4) -> Tasks:
    rows = [{"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n"} for n in range(count)]
    return Tasks(SUITES["humaneval"], rows, [], "made")


def results(right: list[list[int]], **changes: Any) -> dict[str, Any]:
    """Of HumanEval in mode think; right: for each task, 0 or 1 for each sample."""
    made = tasks(len(right))
    samples, scores = [], []
    for row, marks in zip(made.rows, right, strict=True):
        for number, mark in enumerate(marks):
            samples.append(Sample(row["task_id"], completion="", number=number, tokens=10, thought_tokens=4))
            scores.append(Score({"passed": float(mark)}, "passed" if mark else "failed"))
    notes = {"temperature": 0.5, "top_p": 0.95, "seed": 7, "max_new_tokens": 64}
    ks = [k for k in (1, 10) if k <= len(right[0])]
    mode = mode_facts(made, samples, scores, ks, {"writing": 1.0, "scoring": 2.0}, notes)
    suite = {**suite_facts(made, "prompts"), "reference": {"score": {"passed": [4, 4]}, "failed": {"passed": []}}}
    model = {"name": "made", "identity": "0" * 64}
    return {"format": FORMAT, "model": model, "suites": {"humaneval": {**suite, "modes": {"think": mode}, **changes}}}


def packed(tests: list[dict[str, str]]) -> str:
    """Private tests as LiveCodeBench packs them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


ADD = {
    "question_title": "Add",
    "question_content": "Print the sum of two numbers.",
    "question_id": "made_a",
    "contest_date": "2024-05-04T00:00:00",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "10 -4\n", "output": "6\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
PAIRS = {
    "question_title": "Pairs",
    "question_content": "Return all pairs of neighbours.",
    "question_id": "made_b",
    "contest_date": "2024-09-01T00:00:00",
    "starter_code": "class Solution:\n    def pairs(self, row: List[int], twice: bool) -> List[List[int]]:\n        ",
    "public_test_cases": json.dumps(
        [{"input": "[1, 2, 3]\nfalse", "output": "[[1, 2], [2, 3]]", "testtype": "functional"}]
    ),
    "private_test_cases": packed([{"input": "[5]\ntrue", "output": "[]", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "pairs"}),
}
SPLIT = {
    "id": "1/A",
    "title": "Split",
    "time_limit": 1.0,
    "memory_limit": 64.0,
    "description": "Write n as a sum of two numbers.",
    "input_format": "n",
    "output_format": "two numbers",
    "note": None,
    "examples": [{"input": "5", "output": "2 3"}],
    "official_tests": [{"input": "5\n", "output": "2 3\n"}, {"input": "9\n", "output": "4 5\n"}],
    "official_tests_complete": True,
    "input_mode": "stdio",
    "interaction_format": None,
    "generated_checker": """
import sys

def main():
    n = int(open(sys.argv[1]).read())
    found = open(sys.argv[3]).read().split()
    print(1 if len(found) == 2 and sum(map(int, found)) == n else 0)

if __name__ == "__main__":
    main()
""",
}
EQUAL = {**SPLIT, "id": "2/B", "title": "Halves", "generated_checker": None}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A `.jsonl` file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
