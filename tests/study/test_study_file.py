"""The YAML of a study: its forms, and every mistake as one line. Nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from made_study import SMALL

from ra3_megatron.config.errors import UserError
from ra3_megatron.study.plan import cells_of, resolve
from ra3_megatron.study.settings import flatten, overrides
from ra3_megatron.study.spec import ArmConfig, dump_study, load_study, make_study

GOOD: dict[str, Any] = {"name": "s", "folder": "out"}


def lines_of(**values: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        make_study({**GOOD, **values}, "s.yaml")
    return str(error.value).splitlines()


def test_defaults_and_the_forms_of_an_arm() -> None:
    assert make_study(GOOD, "s.yaml").arms == {"ra3": ArmConfig()}
    arms = {
        "empty": None,
        "plain": {"estep": {"steps": 3}},
        "full": {"after": "plain", "settings": {"estep.policy": "{plain}/x"}, "grid": {"estep.horizon": [1, 2]}},
    }
    study = make_study({**GOOD, "arms": arms}, "s.yaml")
    assert study.arms["empty"] == ArmConfig()
    assert study.arms["plain"] == ArmConfig(settings={"estep": {"steps": 3}})
    assert study.arms["full"].after == ["plain"]
    assert study.needs("full") == ["plain"]


def test_it_is_read_back_as_it_is_written(tmp_path: Path) -> None:
    values = {
        "seeds": [3, 1],
        "settings": {"em.control": False, "corpus": {"packages": ["a", "b"], "path": "1e3"}},
        "base": {},
        "arms": {"ra3": {"grid": {"estep.latent_price": [0, 0.05, float("inf")]}}, "ntp": {"method": "ntp"}},
        "reference": "ntp",
        "plots": [{"x": "think_rate", "y": ["code_ce"], "optimum": True}],
    }
    study = make_study({**GOOD, **values}, "s.yaml")
    file = tmp_path / "study.yaml"
    file.write_text(dump_study(study))
    assert load_study(file) == study


def test_settings_survive_as_overrides(tmp_path: Path) -> None:
    """Through text, into a configuration: strings that look like numbers, infinity, lists, null."""
    from ra3_megatron.config.load import load_config

    given = {"corpus": {"source": "folder", "path": "1e3", "packages": []}, "estep.latent_price": float("inf")}
    given |= {"estep.clip_ratio": None, "em.control": False, "tokenizer": {"path": 'a "b" #c'}, "method": "ntp"}
    config = load_config(None, overrides(flatten(given)))
    assert (config.corpus.path, config.tokenizer.path, config.method) == ("1e3", 'a "b" #c', "ntp")
    assert config.estep.latent_price == float("inf") and config.em.control is False
    assert overrides({"corpus.packages": ["1e3", "b, c"]}) == ['corpus.packages=["1e3", "b, c"]']
    assert load_config(None, overrides({"corpus.packages": ["1e3", "b, c"]})).corpus.packages == ["1e3", "b, c"]


def test_overrides_change_the_study_or_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**GOOD, "settings": {"estep": {"steps": 3, "horizon": 2}}}))
    study = load_study(file, ["estep.steps=5", "seeds=[4]", "folder=elsewhere"])
    assert flatten(study.settings) == {"estep.steps": 5, "estep.horizon": 2}
    assert (study.seeds, study.folder) == ([4], "elsewhere")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"armz": {}}, "armz: unknown key; did you mean arms?"),
        ({"name": 3}, "name=3: must be a string"),
        ({"name": ""}, "name=: must not be empty"),
        ({"seeds": []}, "seeds=[]: must not be empty"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: the same seed stands twice"),
        ({"seeds": [-1]}, "seeds=-1: must be at least 0"),
        ({"settings": {"estep.stepz": 1}}, "settings.estep.stepz: unknown key; did you mean estep.steps?"),
        ({"settings": {"seed": 1}}, "settings.seed=1: cannot be set in a study: it is set by `seeds`"),
        ({"settings": {"estep": 3}}, "settings.estep=3: is a section; set one of its keys, such as estep.…"),
        (
            {"settings": {"estep.steps": 1, "estep": {"steps": 2}}},
            "settings.estep.steps: stands twice, dotted and nested",
        ),
        ({"shared_base": True}, "shared_base=true: needs `base`, the settings of the base run ({} for none)"),
        ({"grid": {"estep.steps": []}}, "grid.estep.steps=[]: has no value"),
        ({"grid": {"estep.steps": 3}}, "grid.estep.steps=3: must be a list"),
        ({"grid": {"estep.steps": [1, 1]}}, "grid.estep.steps=[1, 1]: the same value stands twice"),
        ({"grid": {"run_dir": ["a"]}}, "grid.run_dir=a: cannot be set in a study: each cell has a folder of its own"),
        ({"arms": {}}, "arms={}: must not be empty"),
        ({"arms": {"base": {}}}, "arms.base: is the base run's name"),
        ({"arms": {"a b": {}}}, "arms.a b: use letters, digits, '_', '.', '+', '-'"),
        ({"arms": {"a": {}, "b": {"after": "c"}}}, "arms.b.after=c: must be another arm (a)"),
        ({"arms": {"a": {"after": "a"}}}, "arms.a.after=a: must be another arm (there is none)"),
        ({"arms": {"a": {"equal_flops": "x"}}}, "arms.a.equal_flops=x: must be another arm (there is none)"),
        (
            {"arms": {"a": {"after": "b"}, "b": {"settings": {"estep.policy": "{a}/q"}}}},
            "arms: a, b wait for each other (after, equal_flops, names in braces)",
        ),
        ({"arms": {"a": {"estep.policy": "{b}/q"}}}, "arms.a: {b} must name another arm (there is none)"),
        (
            {"arms": {"a": {"estep.policy": "{base}/q"}}},
            "arms.a: {base} needs a base run: set `base` ({} for no settings of its own)",
        ),
        ({"settings": {"estep.policy": "{ra3}"}}, "settings: {ra3} can stand in settings of an arm only"),
        (
            {"arms": {"a": {"settings": {}, "estep.steps": 3}}},
            "arms.a.estep.steps: unknown key beside after, equal_flops, grid, settings: put settings of the run under "
            "`settings`",
        ),
        ({"plots": [{"x": "think_rate", "y": []}]}, "plots[0].y=[]: must not be empty"),
    ],
)
def test_every_mistake_is_one_line(values: dict[str, Any], line: str) -> None:
    assert lines_of(**values) == [f"s.yaml: {line}"]


def test_all_mistakes_are_named_at_once() -> None:
    found = lines_of(seeds=[1, 1], grid={"estep.stepz": [1]}, plots=[{"x": "code_ce", "y": ["speed"]}])
    assert [line.partition(" ")[2].partition("=")[0].partition(":")[0] for line in found] == [
        "seeds",
        "grid.estep.stepz",
        "plots[0].y",
    ]


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study file"):
        load_study(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match=r"list\.yaml:1: must be a mapping"):
        load_study(tmp_path / "list.yaml")
    with pytest.raises(UserError, match="is no override"):
        make_study(GOOD, "s.yaml", ["estep.steps"])


def test_values_are_checked_cell_by_cell(tmp_path: Path) -> None:
    """One line a problem; the cells that have it are named unless all do."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    common = {**GOOD, "config": str(tmp_path / "small.yaml"), "seeds": [1, 2]}
    study = make_study({**common, "settings": {"estep.group_size": 1}}, "s.yaml")
    with pytest.raises(UserError) as error:
        resolve(study, cells_of(study))
    assert str(error.value) == "estep.group_size=1: must be at least 2"
    study = make_study({**common, "arms": {"a": {}, "b": {"estep.steps": "x"}}}, "s.yaml")
    with pytest.raises(UserError) as error:
        resolve(study, cells_of(study))
    assert str(error.value) == "cell b,seed=1 (and 1 more): estep.steps=x: must be an integer"
    study = make_study({**common, "base": {"model": {"hidden_size": 4}}, "arms": {"a": {}}}, "s.yaml")
    with pytest.raises(UserError) as error:
        resolve(study, cells_of(study))
    assert str(error.value).startswith("cell base,seed=1 (and 1 more): model.hidden_size=4: must be at least 8")
