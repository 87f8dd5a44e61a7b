"""The table of keys, and that the committed page is made from it."""

from __future__ import annotations

from pathlib import Path

from ra3_megatron.config.describe import describe, field_of, markdown, sections

ROOT = Path(__file__).parents[2]


def test_every_key_and_section_is_documented() -> None:
    rows = describe()
    assert len({row.key for row in rows}) == len(rows) > 80
    assert [row.key for row in rows if not row.doc] == []
    assert [key for key, section in sections() if not type(section).__doc__] == []


def test_types_bounds_and_defaults_are_shown() -> None:
    rows = {row.key: row for row in describe()}
    assert rows["method"][1:3] == ("ra3 | ntp | rlvr", "ra3")
    assert rows["estep.group_size"][1:3] == ("int >= 2", "8")
    assert rows["estep.latent_price"][1:3] == ("float >= 0", "0.05")
    assert rows["corpus.valid_fraction"].type == "float > 0, < 1"
    assert rows["corpus.packages"][1:3] == ("list of str", "[]")
    assert rows["model.head_dim"][1:3] == ("int >= 2 | null", "null")
    assert rows["run_dir"].type == "str not empty"


def test_defaults_are_those_of_the_section_in_its_place() -> None:
    rows = {row.key: row.default for row in describe()}
    assert rows["estep.optimizer.schedule"] == "constant"
    assert rows["mstep.optimizer.schedule"] == "cosine"


def test_field_of() -> None:
    assert field_of(("estep", "optimizer", "beta1")) is not None
    for key in ((), ("estep", "nope"), ("seed", "nope"), ("nope", "steps")):
        assert field_of(key) is None


def test_the_committed_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "run `make docs-config`"
