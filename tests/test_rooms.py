"""Imports go one way, as the table of docs/architecture.md says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ra3_megatron"
BACK = {("config/load.py", "hf")}
"""The one arrow that points back, named in docs/architecture.md."""


def table() -> dict[str, set[str]]:
    """Room -> rooms that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)/` \| .*? \| (.*) \|$", text, re.MULTILINE)
    rooms: dict[str, set[str]] = {}
    for room, may in rows:
        named = {name for name in [*rooms, *(name for name, _ in rows)] if re.search(rf"\b{name}\b", may)}
        if "all above" in may:
            named |= set(rooms)
        if may == "everything":
            named = {name for name, _ in rows}
        rooms[room] = named | {"config", room}
    return rooms


def room_of(path: str, rooms: dict[str, set[str]]) -> str | None:
    """The innermost room of a file, relative to the package."""
    inside = [room for room in rooms if path.startswith(f"{room}/")]
    return max(inside, key=len) if inside else None


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """(file, file or folder of the package that it imports), relative to the package."""
    found = []
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                if name.startswith(f"{PACKAGE}."):
                    parts = name.removeprefix(f"{PACKAGE}.").replace(".", "/")
                    found.append((file.relative_to(ROOT / PACKAGE).as_posix(), f"{parts}/"))
    return tuple(found)


def test_the_table_has_every_room() -> None:
    rooms = table()
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders <= rooms.keys() and rooms["theory"] == {"theory", "config"}
    assert rooms["text"] == {"text", "config"} and {"mcore", "hf", "text"} <= rooms["em"]


@pytest.mark.parametrize("room", sorted(table()))
def test_imports_go_one_way(room: str) -> None:
    rooms = table()
    wrong = {
        f"{file} imports {target}"
        for file, target in imports()
        if room_of(file, rooms) == room
        and (other := room_of(target, rooms)) is not None
        and other.split("/")[0] not in {name.split("/")[0] for name in rooms[room]}
        and (file, other) not in BACK
    }
    assert not wrong
