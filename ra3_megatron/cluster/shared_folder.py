"""The folder of runs is the same one on every node, and each can write there.

The first process writes a token into a folder of its own beside the run folder; every node reads it and writes an
answer, which the first process reads. Names are new and read by name, so that no cached listing is believed; all is
removed in the end.
"""

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ra3_megatron.cluster.meeting import Meeting
from ra3_megatron.cluster.results import Result

CHECK = "shared folder"
PATIENCE = 5.0
"""Seconds until a file that another node wrote must be seen (attribute caches of NFS)."""


def check(meeting: Meeting, rank: int, parent: Path, leaders: dict[int, str]) -> list[Result]:
    """Results of all nodes on the first process; on others an empty list. Silent. Collective over `leaders`."""
    parent = parent.absolute()
    place = parent / f".ra3-preflight-{uuid.uuid4().hex}"
    made: tuple[str, str] = ("", "")
    if rank == 0:
        made = (place.name, _tried(lambda: _begin(place)))
    try:
        name, problem = meeting.ask("token", made, [0], lambda answers: answers[0])
        if problem:
            return [Result(leaders[0], CHECK, "bad", f"{parent}: {problem}", "no")] if rank == 0 else []
        mine = (str(parent), _tried(lambda: _answer(parent / name, rank))) if rank in leaders else None
        results = meeting.ask(
            "shared folder",
            mine,
            list(leaders),
            lambda answers: [each.as_dict() for each in _judge(parent / name, answers, leaders)],
        )
        return [Result(**result) for result in results] if rank == 0 else []
    finally:
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def _begin(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "token").write_text(place.name, encoding="utf-8")


def _answer(place: Path, rank: int) -> None:
    """Read the token and write this node's answer."""
    if not _appears(place / "token", place.name):
        raise FileNotFoundError(f"it is another folder than the first node's (no {place.name} within {PATIENCE:g} s)")
    (place / f"answer-{rank}").write_text(place.name, encoding="utf-8")


def _judge(place: Path, answers: dict[int, tuple[str, str]], leaders: dict[int, str]) -> list[Result]:
    """answers: rank -> the folder as that node sees it, what went wrong there."""
    found = []
    for rank, node in leaders.items():
        parent, problem = answers[rank]
        if not problem and not _appears(place / f"answer-{rank}", place.name):
            problem = f"what it wrote is not seen on {leaders[0]} within {PATIENCE:g} s"
        text = f"{parent}: {problem or 'read and written'}"
        found.append(Result(node, CHECK, "bad" if problem else "ok", text, "no" if problem else "yes"))
    return found


def _appears(file: Path, content: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if file.read_text(encoding="utf-8") == content:
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _tried(action: Callable[[], None]) -> str:
    """What went wrong with the file system; empty if nothing did."""
    try:
        action()
    except OSError as error:
        return f"cannot be used ({error.strerror})" if error.strerror else str(error)
    return ""
