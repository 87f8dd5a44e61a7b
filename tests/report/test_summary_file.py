"""summary.json: round trip, strictness."""

import dataclasses
import json
from pathlib import Path

import pytest
from made_run import arm, make_summary

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.summary import Summary, read_summary, write_summary


def test_round_trip(tmp_path: Path) -> None:
    summary = make_summary()
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary


def test_smallest_summary_round_trips(tmp_path: Path) -> None:
    summary = Summary(method="ntp", base=arm(2.0))
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert list(summary.arms) == ["base"]


def test_file_has_the_published_keys(tmp_path: Path) -> None:
    value = json.loads(write_summary(tmp_path, make_summary()).read_text())
    assert {"method", "base", "ntp", "ra3", "iterations", "phases", "data", "monitors", "snippets"} <= set(value)
    assert {"code_ce", "thought_ce", "think_rate", "mean_thought_tokens", "reward", "elbo", "tokens", "seconds"} <= set(
        value["ra3"]
    )
    assert value["phases"]["warm start"]["tokens_per_second"] == 14_661.5
    assert value["iterations"][0]["estep"]["reward_last"] == pytest.approx(-2.1)
    assert value["ntp"]["thought_ce"] is None


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    summary = dataclasses.replace(make_summary(), ra3=arm(2.0, reward=float("nan")))
    with pytest.raises(ValueError, match=r"summary\.ra3\.reward is nan"):
        write_summary(tmp_path, summary)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("base.code_ce", lambda value: value["base"].pop("code_ce")),
        ("base.extra", lambda value: value["base"].update(extra=1)),
        ("surprise", lambda value: value.update(surprise=1)),
        ("method", lambda value: value.update(method="sft")),
        ("base.tokens", lambda value: value["base"].update(tokens="many")),
        ("iterations.0.arm", lambda value: value["iterations"][0].update(arm="base")),
    ],
)
def test_other_forms_are_refused_by_key(tmp_path: Path, key: str, change) -> None:
    path = write_summary(tmp_path, make_summary())
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"summary\.json: {key}: "):
        read_summary(tmp_path)


def test_missing_summary_says_when_it_comes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="written when a run ends"):
        read_summary(tmp_path)
