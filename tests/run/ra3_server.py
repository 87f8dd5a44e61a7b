"""Runs `ra3` commands in forked processes: what takes seconds to import is imported once.

A request is a JSON line on standard input, the answer a JSON line on standard output. The commands are not told that
they are tested: everything that a test changes in them is named in the request.

    {"arguments": ["train", …], "output": PATH, "errors": PATH,
     "set": {"module:NAME": value},                              other values of module constants
     "kill": ["module:NAME", "before" | "after", N],            SIGKILL at the N-th call of a function or method
     "signal": ["module:NAME", "before" | "after", N, NAME],    another signal there
     "loss_times": {"module:CLASS": {NUMBER: FACTOR}},          a wrong loss in `CLASS.step(NUMBER)` (may be NaN)
     "file_size": BYTES}                                        no file may grow beyond (a full disk)
    -> {"code": exit code, or minus the signal}
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback
from typing import Any

PRELOADED = (
    "ra3_megatron.cli",
    "ra3_megatron.verbs.train",
    "ra3_megatron.em.loop",
    "ra3_megatron.em.outcome",
    "ra3_megatron.verbs.infuse",
    "ra3_megatron.report.build",
    "ra3_megatron.report.show",
    "ra3_megatron.report.versions",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        _, status = os.waitpid(child, 0)
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()


def _run(request: dict[str, Any]) -> None:
    code: Any = 1
    try:
        for number, file in ((1, request["output"]), (2, request["errors"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, value in request.get("set", {}).items():
            owner, name = _resolve(target)
            setattr(owner, name, value)
        if request.get("kill"):
            _kill_at(*request["kill"])
        if request.get("signal"):
            _kill_at(*request["signal"])
        for target, factors in request.get("loss_times", {}).items():
            _multiply_loss(target, {int(number): factor for number, factor in factors.items()})
        if request.get("file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        sys.argv = ["ra3", *request["arguments"]]
        from ra3_megatron.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _resolve(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _kill_at(target: str, when: str, call: int, name: str = "SIGKILL") -> None:
    number = signal.Signals[name]
    owner, attribute = _resolve(target)
    function = getattr(owner, attribute)
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            _send(number)
        result = function(*args, **kwargs)
        if calls == call and when == "after":
            _send(number)
        return result

    setattr(owner, attribute, wrapped)


def _send(number: signal.Signals) -> None:
    if number is signal.SIGKILL:
        os.kill(os.getpid(), number)
    else:  # Python may notice much later what another thread of the process was interrupted by
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _multiply_loss(target: str, factors: dict[int, float]) -> None:
    from ra3_megatron.mcore import trainer

    owner = getattr(*_resolve(target))
    step, loss = owner.step, trainer._training_loss
    factor = 1.0

    def wrong_step(self: Any, number: int) -> Any:
        nonlocal factor
        factor = factors.get(number, 1.0)
        try:
            return step(self, number)
        finally:
            factor = 1.0

    def wrong_loss(*args: Any, **kwargs: Any) -> Any:
        total, tokens, stats = loss(*args, **kwargs)
        return total * factor, tokens, stats * factor

    owner.step, trainer._training_loss = wrong_step, wrong_loss


if __name__ == "__main__":
    serve()
