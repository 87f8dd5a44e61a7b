"""The process on a rollout node that hosts engines for one attempt of a run after another.

It never ends an attempt by itself: SIGUSR1 and SIGTERM ask the trainer to save and stop, and this process ends, after a
SIGTERM, as soon as the trainer has gone.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ra3_megatron.rollout.nodes.meeting import read_meeting
from ra3_megatron.rollout.nodes.messages import Begin, Begun, Done, End, Ended, Failed, Offer
from ra3_megatron.rollout.refit.channel import connect
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.vllm.process import EngineError, EngineProcess
from ra3_megatron.rollout.vllm.wire import own_address, tune

POLL_SECONDS = 0.5
"""Between two looks for the trainer; a shared file system tells nobody that a file has come."""

CONNECT_SECONDS = 10.0
"""An address of the trainer that does not answer by then is another network's."""


class Host:
    """Use: `run`, in the main thread, with which the engines end."""

    def __init__(self, folder: Path, engines: int | None, address: str | None, say: Callable[[str], None]) -> None:
        """folder: shared with the trainer. engines: at most so many at once; none: see `Offer`. address: at which the
        trainer reaches this node; none: that from which this node reaches the trainer. say: shows a line."""
        self._folder, self._limit, self._address, self._say = folder, engines, address, say
        self._node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._gpus = visible_gpus()
        self._serving = self._ending = False
        self._unanswered = ""
        """The attempt that last did not answer."""

    def run(self) -> None:
        """Host engines until the trainer says that the run is finished, or this process is asked to end."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._asked_to_end)
        self._say(f"{self._node}: waiting for the trainer in {self._folder}")
        while not self._ending:
            trainer = self._find()
            if trainer is None:
                time.sleep(POLL_SECONDS)
                continue
            self._serving = True
            with trainer:
                finished = self._serve(trainer)
            self._serving = False
            if finished:
                self._say(f"{self._node}: the run is finished")
                return
            self._say(f"{self._node}: the trainer has gone, and its engines with it")

    def _asked_to_end(self, number: int, frame: Any) -> None:
        self._ending = True
        if not self._serving:
            sys.exit(0)

    def _find(self) -> Connection | None:
        """A connection to the trainer, if it is there."""
        meeting = read_meeting(self._folder)
        if meeting is None:
            return None
        why = ""
        for host in meeting.hosts:
            try:
                connection = connect((host, meeting.port), meeting.key, CONNECT_SECONDS)
            except RefitError as error:
                why = why or f"{host}:{meeting.port}: {error.__cause__}"
                continue
            tune(connection)
            return connection
        if self._unanswered != meeting.attempt:
            self._unanswered = meeting.attempt
            self._say(f"{self._node}: attempt {meeting.attempt} does not answer ({why})")
        return None

    def _serve(self, trainer: Connection) -> bool:
        """Do what one attempt asks for; whether it said that the run is finished. No engine is left."""
        engines: dict[int, EngineProcess] = {}
        starting: dict[EngineProcess, int] = {}
        address = self._address or own_address(trainer)
        cores = len(os.sched_getaffinity(0))
        try:
            trainer.send(Offer(self._node, address, cores, self._gpus, self._limit))
            while True:
                watched: list[Any] = [trainer, *starting]
                for event in wait(watched):
                    if isinstance(event, EngineProcess):
                        if event in starting:  # it was not ended just now
                            trainer.send(_started(event, starting.pop(event)))
                        continue
                    message = trainer.recv()
                    if isinstance(message, Done):
                        return True
                    if isinstance(message, Begin):
                        log = self._folder / message.log
                        self._say(f"{self._node}: engine {message.number} starts, log {log}")
                        spec = replace(message.spec, model=str(self._folder / message.spec.model))
                        try:
                            engine = EngineProcess.start(spec, log, address)
                        except OSError as error:
                            trainer.send(Failed(message.number, f"the vLLM engine could not be started: {error}"))
                            continue
                        engines[message.number], starting[engine] = engine, message.number
                    elif isinstance(message, End):
                        ended = engines.get(message.number)
                        if ended is not None:
                            starting.pop(ended, None)
                        trainer.send(Ended(message.number, _end(ended, message.how)))
        except (EOFError, OSError) as error:
            if not isinstance(error, EOFError | ConnectionError):
                self._say(f"{self._node}: {error}")
            return False
        finally:
            for engine in engines.values():
                engine.kill()


def _started(engine: EngineProcess, number: int) -> Begun | Failed:
    """What came of an engine that says so."""
    try:
        return Begun(number, engine.wait_ready(0.0), engine.authkey)
    except EngineError as error:
        return Failed(number, str(error))


def _end(engine: EngineProcess | None, how: str) -> str:
    if engine is None:
        return "it did not start"
    if how == "close":
        engine.close()
    elif how == "kill":
        engine.kill()
    return engine.epitaph()


def visible_gpus() -> tuple[str, ...]:
    """This process's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")[:count]) if named else tuple(str(number) for number in range(count))
