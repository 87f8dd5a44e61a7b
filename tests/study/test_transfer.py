"""The transfer study: what is read off a curve, tables over seeds, differences, and the report from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.errors import UserError
from ra3_megatron.report.numbers import ABSENT
from ra3_megatron.study.plan import cells_of
from ra3_megatron.study.ready import transfer_study
from ra3_megatron.study.spec import StudyConfig, dump_study, make_study
from ra3_megatron.study.transfer.curves import Curve, Run, curve_of
from ra3_megatron.study.transfer.figures import draw
from ra3_megatron.study.transfer.measures import differences_table, transfer_table
from ra3_megatron.study.transfer.report import build_transfer_report, tables_of
from ra3_megatron.study.transfer.verdicts import verdicts, verdicts_table

CONFIG = "rlvr: {steps: 20, problems: {source: tasks}}\ncorpus: {source: tasks}\n"


def records(rates: dict[int, float], signal: float = 0.5) -> list[dict[str, Any]]:
    """Metrics of a run: evaluations at these steps; an update samples 100 tokens and takes 2 seconds."""
    lines: list[dict[str, Any]] = []
    for step in range(max(rates) + 1):
        if step:
            values = {"sampled_tokens": 100.0, "seconds": 3.0, "seconds_evaluation": 1.0}
            equal = {"all_right": 0.0, "all_wrong": 1 - signal}
            lines.append({"phase": "rlvr", "iteration": 0, "step": step, "global_step": 0, **values, **equal})
        if step in rates:
            lines.append(
                {"phase": "held_out", "iteration": 0, "step": step, "global_step": 0, "pass_at_1": rates[step]}
            )
    return lines


def curve(rates: dict[int, float]) -> Curve:
    return curve_of(records(rates))


def test_first_crossings_are_between_evaluations() -> None:
    found = curve({0: 0.1, 10: 0.3, 20: 0.7})
    assert found.reached(0.5, "steps") == pytest.approx(15) and found.reached(0.5, "tokens") == pytest.approx(1500)
    assert found.reached(0.5, "seconds") == pytest.approx(30) and found.reached(0.9, "steps") is None
    assert found.reached(0.1, "steps") == 0 and curve({0: 0.6, 5: 0.2}).reached(0.5, "tokens") == 0
    dips = curve({0: 0.0, 10: 0.6, 20: 0.4, 30: 0.8})
    assert dips.reached(0.5, "steps") == pytest.approx(10 * 5 / 6)


def test_area_and_asymptote() -> None:
    found = curve({0: 0.0, 10: 0.4, 20: 0.8})
    assert found.area == pytest.approx(0.4) and found.asymptote == pytest.approx(0.8)
    assert curve({0: 0.2}).area == pytest.approx(0.2)
    assert curve({0: 0.0, 4: 0.5, 6: 0.7, 8: 0.9}).asymptote == pytest.approx(0.8)
    with pytest.raises(ValueError, match="no evaluation"):
        curve_of([])


def study(tmp_path: Path, seeds: int = 3) -> StudyConfig:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    starts = [f"{name}={tmp_path}/starts/{name}-{{seed}}" for name in ("base", "ntp", "ra3")]
    return transfer_study(config, [], tmp_path / "study", seeds, starts, None)


def write_cells(of: StudyConfig) -> None:
    """Folders as `ra3 rlvr` leaves them: RA3 reaches 90%, the others do not."""
    slopes = {"base": 0.02, "ntp": 0.01, "ra3": 0.05}
    (of.path).mkdir(parents=True, exist_ok=True)
    (of.path / "study.yaml").write_text(dump_study(of))
    for cell in cells_of(of):
        folder = cell.folder(of.path)
        folder.mkdir(parents=True)
        rates = {s: min(1.0, 0.01 * cell.seed + slopes[cell.arm] * s) for s in (0, 5, 10, 15, 20)}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records(rates)))
        (folder / "summary.json").write_text('{"kind": "rlvr"}')


def test_tables(tmp_path: Path) -> None:
    of = study(tmp_path)
    runs = [
        Run(cell, curve({0: 0.0, 10: 0.25, 20: 0.5 if cell.arm == "ntp" and cell.seed > 1 else 0.4}))
        if cell.arm != "ra3"
        else Run(cell, curve({0: 0.4, 10: 0.9 + 0.01 * cell.seed, 20: 1.0}))
        for cell in cells_of(of)
    ]
    table = transfer_table(runs)
    column = {name: number for number, name in enumerate(table.header)}
    rows = {row[0]: row for row in table.rows}
    assert rows["base"][column["steps to 50%"]] == "never" and rows["ra3"][column["start"]] == "40.0%"
    assert rows["ntp"][column["steps to 50%"]] == "20.0 (2 of 3)"
    differences = {row[0]: row for row in differences_table(runs, {"base": "ntp", "ra3": "ntp"}).rows}
    assert set(differences) == {"base - ntp", "ra3 - ntp"}
    asymptote = differences["ra3 - ntp"][column["asymptote"]]
    assert asymptote.startswith("+53.3 pp [")
    assert differences["base - ntp"][column["steps to 90%"]] == ABSENT
    assert differences["base - ntp"][column["steps to 50%"]] == "+0.0 (2 of 3)", "ntp reaches it with the last update"


def test_means_are_over_the_seeds_that_every_start_has(tmp_path: Path) -> None:
    """An arm without its worst seed would look better than it is."""
    cells = [cell for cell in cells_of(study(tmp_path)) if cell.name != "ra3,seed=1"]
    runs = [Run(cell, curve({0: 0.0, 10: 0.1 * cell.seed})) for cell in cells]
    table = transfer_table(runs)
    end = table.header.index("asymptote")
    assert {(row[1], row[end]) for row in table.rows} == {("2", "25.0%")}
    assert "Means over the seeds that every start has" in table.note
    apart = [run for run in runs if (run.cell.arm == "ntp") == (run.cell.seed == 2)]
    assert "they do not compare" in transfer_table(apart).note and "they do not compare" in draw(apart)[0].caption
    for picture in draw(runs):
        assert all(len(line.get_xdata()) for axes in picture.figure.axes for line in axes.lines)
    first = draw(runs)[0].figure.axes[0]
    assert sum(line.get_lw() < 1 and line.get_color() != "#bbbbbb" for line in first.lines) == 6


@pytest.mark.parametrize(
    ("keys", "compared"),
    [
        ({}, ["base - ntp", "ra3 - ntp"]),
        ({"reference": "base"}, ["ntp - base", "ra3 - base"]),
        (
            {"reference": "ntp", "grid": {"rlvr.group_size": [4, 8]}},
            [f"{arm},group_size={size} - ntp,group_size={size}" for arm in ("base", "ra3") for size in (4, 8)],
        ),
    ],
)
def test_a_file_of_a_study_names_what_is_compared(tmp_path: Path, keys: dict[str, Any], compared: list[str]) -> None:
    """As for other studies: an arm called ntp unless it says another, at the same grid point."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    common = {"name": "file", "verb": "rlvr", "folder": str(tmp_path / "out"), "config": str(tmp_path / "config.yaml")}
    arms = {name: {"rlvr.checkpoint": name} for name in ("base", "ntp", "ra3")}
    of = make_study({**common, "seeds": [1, 2], "arms": arms, **keys}, "made.yaml")
    write_cells(of)
    found = {table.title: table for table in tables_of(of.path, of, cells_of(of))}["Differences, paired by seed"]
    assert [row[0] for row in found.rows] == compared


def spent(rates: dict[int, float], tokens: float) -> Curve:
    """A curve whose updates sample so many tokens each, a second for ten."""
    at = [tokens * step for step in rates]
    return Curve(list(rates), at, [place / 10 for place in at], list(rates.values()), [0.5] * max(rates))


def test_differences_are_of_levels_and_not_of_budgets(tmp_path: Path) -> None:
    cells = [cell for cell in cells_of(study(tmp_path)) if cell.arm != "base"]

    def row(ra3: dict[int, float], ntp: dict[int, float]) -> dict[str, str]:
        runs = [
            Run(cell, spent(ra3, 180.0 + cell.seed) if cell.arm == "ra3" else spent(ntp, 40.0 + cell.seed))
            for cell in cells
        ]
        table = differences_table(runs, {"ra3": "ntp"})
        (only,) = table.rows
        return dict(zip(table.header, only, strict=True))

    never = row({0: 0.1, 10: 0.2}, {0: 0.1, 10: 0.2})
    assert [never[f"{axis} to 50%"] for axis in ("steps", "tokens", "seconds")] == [ABSENT] * 3
    once = row({0: 0.1, 5: 0.5, 10: 0.6}, {0: 0.1, 10: 0.2})
    assert once["steps to 50%"].startswith("-5.0 [") and once["tokens to 50%"] == once["seconds to 50%"] == ABSENT
    longer = row({0: 0.1, 10: 0.2}, {0: 0.1, 20: 0.2})
    assert longer["steps to 50%"] == ABSENT
    assert row({0: 0.1, 5: 0.6, 10: 0.6}, {0: 0.1, 20: 0.2})["steps to 50%"] == ABSENT


def test_verdicts(tmp_path: Path) -> None:
    """RA3 has a signal, is sooner and ends higher than NTP; against the base its end is no higher in every seed."""
    ends = {"base": 0.97, "ntp": 0.1, "ra3": 0.95}
    signals = {"base": 0.5, "ntp": 0.01, "ra3": 0.4}

    def of(arm: str, seed: int) -> Curve:
        middle = {"base": 0.1, "ntp": 0.02, "ra3": 0.8}[arm] + 0.01 * seed
        return curve_of(records({0: 0.0, 10: middle, 20: ends[arm] + 0.01 * (seed - 2)}, signals[arm]))

    cells = cells_of(study(tmp_path))
    runs = [Run(cell, of(cell.arm, cell.seed)) for cell in cells]
    words = {verdict.name: verdict.word for verdict in verdicts(runs)}
    assert words == {
        "P5 signal": "confirmed",
        "P5 speed, base": "confirmed",
        "P5 end, base": "refuted",
        "P5 speed, ntp": "confirmed",
        "P5 end, ntp": "confirmed",
    }
    two = [run for run in runs if run.cell.seed < 3]
    assert {verdict.word for verdict in verdicts(two)} == {"undecided"}
    without = [run for run in runs if run.cell.arm != "ntp"]
    assert verdicts(without)[0].word == "not run" and not verdicts_table([r for r in runs if r.cell.arm != "ra3"]).rows
    changed = [Run(run.cell, of("ra3" if run.cell.arm == "ntp" else "ntp", run.cell.seed)) for run in runs]
    assert {v.word for v in verdicts(changed) if v.name.endswith(("signal", "ntp"))} == {"refuted"}


def test_verdicts_without_a_case_are_undecided(tmp_path: Path) -> None:
    """No update, hence no signal; 50% never reached, with budgets that differ."""

    def of(arm: str) -> Curve:
        return spent({0: 0.1, {"ra3": 10, "ntp": 20, "base": 10}[arm]: 0.2}, 40.0)

    runs = [Run(cell, of(cell.arm)) for cell in cells_of(study(tmp_path))]
    words = {verdict.name: verdict.word for verdict in verdicts(runs)}
    assert words["P5 speed, ntp"] == words["P5 speed, base"] == "undecided"
    still = [run if run.cell.arm == "ra3" else Run(run.cell, Curve([0], [0.0], [0.0], [0.1], [])) for run in runs]
    assert {verdict.name: verdict.word for verdict in verdicts(still)}["P5 signal"] == "undecided"


def test_starts_are_named_and_paired_by_seed(tmp_path: Path) -> None:
    of = study(tmp_path, seeds=2)
    assert (
        of.verb == "rlvr" and of.reference == "ntp" and of.seeds == [1, 2] and list(of.arms) == ["base", "ntp", "ra3"]
    )
    from ra3_megatron.study.plan import resolve

    configs = resolve(of, cells_of(of))
    assert {name: config.rlvr.checkpoint for name, config in configs.items() if name.startswith("base")} == {
        f"base,seed={seed}": f"{tmp_path}/starts/base-{seed}" for seed in (1, 2)
    }
    assert configs["ra3,seed=2"].rlvr.checkpoint == f"{tmp_path}/starts/ra3-2" and configs["ra3,seed=2"].seed == 2


@pytest.mark.parametrize(
    ("starts", "reference", "said"),
    [
        (["ra3"], None, "must be a name and a checkpoint"),
        (["a=x", "a=y"], None, "a is named twice"),
        ([], None, "needs --start"),
        (["a=x"], "b", "--reference b: must be one of a"),
    ],
)
def test_starts_that_are_none(tmp_path: Path, starts: list[str], reference: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        transfer_study(tmp_path / "config.yaml", [], tmp_path / "study", 1, starts, reference)


def test_the_report_is_built_from_the_folder(tmp_path: Path) -> None:
    """Also when the study was moved: its own path in study.yaml is not asked."""
    of = study(tmp_path)
    write_cells(of)
    of.path.rename(tmp_path / "moved")
    of = of.model_copy(update={"folder": str(tmp_path / "moved")})
    page = build_transfer_report(of.path).read_text()
    assert page.count("data:image/png") == 2 and "Differences, paired by seed" in page and "9 of 9 done" in page
    lines = [json.loads(line) for line in (of.path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and {line["start"] for line in lines} == {"base", "ntp", "ra3"}
    assert "| ra3" in (of.path / "table.md").read_text() and "P5 speed, ntp" in page
    result = CliRunner().invoke(app, ["study", "report", str(of.path)])
    assert result.exit_code == 0 and result.output.strip() == str(of.path / "report.html")


def test_runs_without_held_out_problems_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["study", "rlvr-transfer", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "study")]
    options = ["--start", "ra3=x", "--start", "ntp=y", "rlvr.problems.held_out=0"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 2 and not (tmp_path / "study").exists()
    assert (
        result.stderr.startswith("ra3: rlvr.problems.held_out=0: must be at least 1") and result.stderr.count("\n") == 1
    )


def test_a_run_without_an_evaluation_is_named(tmp_path: Path) -> None:
    of = study(tmp_path, seeds=1)
    write_cells(of)
    place = cells_of(of)[0].folder(of.path)
    (place / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=rf"{place}: no evaluation on held-out problems"):
        build_transfer_report(of.path)


def test_dry_run_lists_the_cells(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["study", "rlvr-transfer", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "study")]
    result = CliRunner().invoke(app, [*command, "--start", "ra3=x", "--start", "ntp=y", "--seeds", "2", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("ra3,seed=1", "ntp,seed=2")) and not (tmp_path / "study").exists()
