"""evalplus's ground truth, sanitiser and `check_correctness` over samples; see the package's docstring.

The data file comes by HUMANEVAL_OVERRIDE_PATH or MBPP_OVERRIDE_PATH, which evalplus reads when it is imported, and the
ground truth from a folder where the action `truth`, which runs no samples, has written one file a task: evalplus's own
file of MBPP+ has 756 MB, and several GB in memory. `check_correctness` starts a process for each sample, so threads
wait for them, and nothing is copied between processes. The command `evalplus.evaluate` is not used: it refuses a part
of the tasks, and takes an old results file beside the samples for the answer.
"""

import json
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def main() -> int:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        from evalplus.data import get_human_eval_plus, get_human_eval_plus_hash, get_mbpp_plus, get_mbpp_plus_hash
        from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
        from evalplus.evaluate import check_correctness, get_groundtruth
        from evalplus.sanitize import sanitize
    except ImportError as error:
        print(f"evalplus: {error}", file=sys.stderr)  # noqa: T201
        return 64
    dataset = request["dataset"]
    if dataset == "humaneval":
        problems, digest, special = get_human_eval_plus(), get_human_eval_plus_hash(), []
    else:
        problems, digest, special = get_mbpp_plus(), get_mbpp_plus_hash(), MBPP_OUTPUT_NOT_NONE_TASKS
    folder = Path(request["truth"])
    if request["action"] == "truth":
        truth = get_groundtruth(problems, digest, special)
        for number, name in enumerate(problems):
            (folder / f"{number}.pkl").write_bytes(pickle.dumps(truth[name]))
        shutil.rmtree(folder / "evalplus")
        json.dump(len(truth), answer)
        answer.close()
        return 0
    place = {name: number for number, name in enumerate(problems)}
    wanted = {sample["task_id"] for sample in request["samples"]}
    truth = {name: pickle.loads((folder / f"{place[name]}.pkl").read_bytes()) for name in wanted}
    with ThreadPoolExecutor(request["workers"]) as pool:
        waiting = []
        for sample in request["samples"]:
            problem = problems[sample["task_id"]]
            code = sample["solution"] if "solution" in sample else problem["prompt"] + sample["completion"]
            if request["sanitize"]:
                code = sanitize(code, entrypoint=problem["entry_point"])
            options = {"fast_check": True, "min_time_limit": request["min_time_limit"]}
            waiting.append(
                pool.submit(check_correctness, dataset, 0, problem, code, truth[sample["task_id"]], **options)
            )
        json.dump([_outcome(future.result()) for future in waiting], answer)
    answer.close()
    return 0


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """evalplus counts a sample as right on the plus tests only when it passes the base tests too."""
    base, plus = result["base"][0], result["plus"][0]
    scores = {"plus": float(base == plus == "pass"), "base": float(base == "pass")}
    return {"scores": scores, "detail": f"base tests: {base}, plus tests: {plus}"}


if __name__ == "__main__":
    sys.exit(main())
