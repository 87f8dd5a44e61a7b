"""Results, tables, figures and the page of made studies: all done, partly done, nothing done, with extra sections."""

from __future__ import annotations

import json
import math
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_study import finish, make, study_of
from matplotlib.figure import Figure

from ra3_megatron.config.errors import UserError
from ra3_megatron.study import report as report_module
from ra3_megatron.study.comparison import Difference, MStepCheck, differences, mstep_checks, reference_of
from ra3_megatron.study.figures import _Places, draw_figures
from ra3_megatron.study.intervals import Interval
from ra3_megatron.study.measures import MEASURES
from ra3_megatron.study.plan import cells_of
from ra3_megatron.study.report import ReportSection, build_study_report
from ra3_megatron.study.results import finished, with_shared_seeds
from ra3_megatron.study.spec import STUDY_FILE, PlotConfig, StudyConfig
from ra3_megatron.study.state import record_failure
from ra3_megatron.study.tables import differences_table, mstep_table, results_table

ARMS = {"ntp": {"method": "ntp"}, "ra3": {}}


class Page(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.images = 0
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def two_arms(folder: Path, **values: object) -> StudyConfig:
    return study_of(folder, seeds=[1, 2, 3], arms=ARMS, settings={"em.iterations": 2}, **values)


def test_results_hold_every_cell_and_iteration(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=[1, 2], base={}, grid={"estep.latent_price": [0.05, math.inf]})
    make(study, {})
    build_study_report(study.path)
    rows = [json.loads(line) for line in (study.path / "results.jsonl").read_text().splitlines()]
    assert [(row["cell"], row["iteration"]) for row in rows[:5]] == [
        ("base,seed=1", 0),
        ("ra3,latent_price=0.05,seed=1", 0),
        ("ra3,latent_price=0.05,seed=1", 1),
        ("ra3,latent_price=inf,seed=1", 0),
        ("ra3,latent_price=inf,seed=1", 1),
    ]
    assert rows[4]["grid"] == {"estep.latent_price": "inf"} and rows[2]["grid"] == {"estep.latent_price": 0.05}
    assert rows[2].keys() == {"cell", "arm", "grid", "seed", "iteration", *MEASURES}
    assert (rows[1]["flops"], rows[2]["flops"], rows[2]["tokens"]) == (100.0, 300.0, 1000)


def test_the_page_of_a_finished_study(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    make(study, {"ra3": 0.2, "ntp": 0.1}, monitors=1)
    page = Page(build_study_report(study.path))
    assert "6 cells, all done." in page.text and "Cells that are not done" not in page.text
    assert page.images == 1 and (study.path / "figures" / "against-iteration.png").stat().st_size > 10_000
    for word in ("ra3 − ntp", "better", "fell by", "noisy latents", "3.11.9", "2.13.0", "method : ntp"):
        assert word in page.text, word
    assert "vllm" not in page.text
    table = (study.path / "table.md").read_text()
    assert table.startswith("## Study made\n\n### Held-out figures\n\n| arm | seeds | code CE |")
    assert "| ra3 − ntp | code (nats/line) | -0.8" in table


def test_the_page_of_a_study_that_is_not_done(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    cells = make(study, {}, without=("ra3,seed=2", "ra3,seed=3", "ntp,seed=3"))
    failed = cells[3].folder(study.path)
    assert cells[3].name == "ra3,seed=2"
    record_failure(failed, "exit code 2: ra3: <b>no</b> room", 2)
    (study.path / "cells" / "ntp,seed=3" / "checkpoints").mkdir(parents=True)
    page = Page(build_study_report(study.path))
    assert "3 of 6 cells are done" in page.text
    assert f"ra3,seed=2 failed exit code 2: ra3: <b>no</b> room ({failed}/log.txt)" in page.text
    assert "ntp,seed=3 not finished goes on where it was" in page.text
    assert "ra3,seed=3 not run" in page.text
    assert "better (these seeds)" not in page.text  # no difference was made
    (row,) = [row for row in results_table(finished(study.path, cells)).rows if row[0] == "ntp"]
    assert row[1] == "1"  # means over the seed that both arms have


def test_a_study_without_any_result(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    make(study, {}, without=tuple(cell.name for cell in cells_of(study)))
    page = Page(build_study_report(study.path))
    assert "No cell is done yet" in page.text and page.images == 0
    assert (study.path / "results.jsonl").read_text() == ""


def test_other_code_adds_sections(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    make(study, {})
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    section = ReportSection("Ground truth", "<table><tr><td>F1 0.98</td></tr></table>", {"where it thinks": figure})
    page = Page(build_study_report(study.path, [section]))
    assert "Ground truth F1 0.98 where it thinks" in page.text and page.images == 2
    assert (study.path / "figures" / "section-1-1.png").is_file()
    assert Page(build_study_report(study.path)).images == 1
    assert not (study.path / "figures" / "section-1-1.png").exists()


def test_a_study_names_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_sections")
    made = ReportSection("6 cells", "<p>known</p>")
    module.sections = lambda done, folder: [made] if len(done) == 6 and folder == study.path else []
    monkeypatch.setitem(sys.modules, "made_sections", module)
    monkeypatch.setitem(report_module.SECTIONS, "hopprog", "made_sections")
    study = two_arms(tmp_path, sections="hopprog")
    make(study, {})
    section = ReportSection("also", "")
    assert "6 cells known also" in Page(build_study_report(study.path, [section])).text


def test_no_study_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a study \(it has no study.yaml\)"):
        build_study_report(tmp_path)


def test_differences_are_paired_with_the_reference(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    cells = make(study, {"ra3": 0.2, "ntp": 0.1})
    (found,) = differences(study, cells, finished(study.path, cells))
    assert (found.group, found.reference) == ("ra3", "ntp")
    interval = found.intervals["line_nll"]  # made lines fall by 4 times the gain each iteration
    assert interval.mean == pytest.approx(-0.8) and interval.n_seeds == 3 and interval.n_documents == 12
    rows = differences_table([found]).rows
    assert [row[5] for row in rows] == ["better"] * 4 + ["not told apart"] * 3
    for file in study.path.glob("cells/ra3,seed=*/evaluations/ra3-2.lines.jsonl"):
        file.write_text(file.read_text().replace('"document": "d', '"document": "other'))
    assert differences(study, cells, finished(study.path, cells)) == []
    for file in study.path.glob("cells/ra3,seed=*/evaluations/ra3-2.lines.jsonl"):
        file.write_text(file.read_text().replace('"document": "other', '"document": "d'))
    (swapped,) = differences(study.model_copy(update={"reference": "ra3"}), cells, finished(study.path, cells))
    assert [row[5] for row in differences_table([swapped]).rows] == ["worse"] * 4 + ["not told apart"] * 3


def test_a_reading_needs_every_interval_and_says_when_it_is_about_these_seeds() -> None:
    def reading(low: float, high: float, seeds: tuple[float | None, float | None]) -> str:
        interval = Interval((low + high) / 2, low, high, 3, 5, *seeds)
        return differences_table([Difference("a", "b", {"line_nll": interval})]).rows[0][5]

    assert reading(-2, -1, (-3, -0.5)) == "better" and reading(1, 2, (0.5, 3)) == "worse"
    assert reading(-2, -1, (-3, 0.5)) == reading(1, 2, (-0.5, 3)) == reading(-1, 1, (1, 2)) == "not told apart"
    assert reading(1, 2, (None, None)) == "worse (these seeds)"


def test_what_is_compared_with_what(tmp_path: Path) -> None:
    grid = {"estep.latent_price": [0, 1]}
    both = study_of(tmp_path, arms=ARMS, grid=grid)
    assert reference_of(both, cells_of(both)) == {
        "ra3,latent_price=0": "ntp,latent_price=0",
        "ra3,latent_price=1": "ntp,latent_price=1",
    }
    one = study_of(tmp_path, arms={"ntp": {"method": "ntp"}, "ra3": {"grid": grid}})
    assert set(reference_of(one, cells_of(one)).values()) == {"ntp"}
    point = study_of(tmp_path, grid=grid, reference="ra3,latent_price=1")
    assert reference_of(point, cells_of(point)) == {"ra3,latent_price=0": "ra3,latent_price=1"}
    assert reference_of(study_of(tmp_path), cells_of(study_of(tmp_path))) == {}
    wrong = study_of(tmp_path, grid=grid, reference="ra3,latent_price=2")
    with pytest.raises(UserError, match=r"reference=ra3,latent_price=2: must be an arm \(ra3\) or one of ra3,latent"):
        reference_of(wrong, cells_of(wrong))


def test_each_m_step_is_judged(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    cells = make(study, {"ra3": 0.2, "ntp": -0.1})
    checks = mstep_checks(finished(study.path, cells))
    assert [(c.group, c.iteration) for c in checks] == [("ntp", 1), ("ntp", 2), ("ra3", 1), ("ra3", 2)]
    assert checks[0].after - checks[0].before == pytest.approx(0.1, abs=0.02)
    assert checks[0].interval is not None and checks[0].interval.mean == pytest.approx(0.1, abs=0.02)
    verdicts = [row[4] for row in mstep_table(checks).rows]
    assert all(text.startswith("rose by 0.") for text in verdicts[:2])
    assert all(text.startswith("fell by 0.") for text in verdicts[2:])


@pytest.mark.parametrize(
    ("after", "interval", "verdict"),
    [
        (0.9, Interval(-0.1, -0.2, -0.01, 3, 9, -0.3, -0.02), "fell by 0.1000"),
        (1.1, Interval(0.1, 0.01, 0.2, 3, 9, 0.02, 0.3), "rose by 0.1000"),
        (0.9, Interval(-0.1, -0.2, -0.01, 3, 9, -0.3, 0.02), "not told apart"),
        (0.9, Interval(-0.1, -0.2, 0.01, 3, 9, -0.3, -0.02), "not told apart"),
        (0.9, Interval(0.1, 0.01, 0.2, 3, 9, 0.02, 0.3), "not told apart"),
        (1.0, Interval(-0.1, -0.2, -0.01, 3, 9, -0.3, -0.02), "not told apart"),
        (0.9, Interval(-0.1, -0.2, -0.01, 2, 9), "fell by 0.1000 (these seeds)"),
        (0.9, None, "fell by 0.1000 (no interval)"),
    ],
)
def test_an_m_step_is_judged_by_its_intervals(after: float, interval: Interval | None, verdict: str) -> None:
    assert MStepCheck("ra3", 1, 1.0, after, interval).verdict == verdict


def test_figures_of_an_earlier_report_may_vanish_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another report of the same study removes them too."""
    (tmp_path / "figures").mkdir()
    gone = tmp_path / "figures" / "gone.png"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    assert report_module.write_pictures(tmp_path, []) == []


def test_means_are_over_seeds_that_every_arm_has(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    cells = make(study, {}, without=("ra3,seed=2",))
    done = finished(study.path, cells)
    assert {cell.cell.seed for cell in with_shared_seeds(done)} == {1, 3}
    assert with_shared_seeds([]) == []
    apart = [cell for cell in done if (cell.cell.arm == "ntp") == (cell.cell.seed == 2)]
    assert with_shared_seeds(apart) == apart
    for cells_, said in ((done, "Means over the seeds that every arm has"), (apart, "they do not compare")):
        picture = draw_figures(study.model_copy(update={"plots": [PlotConfig(x="code_ce", y=["elbo"])]}), cells_)[0]
        assert said in results_table(cells_).note and said in picture.caption


def test_axes_span_decades_with_zero_and_infinity_at_the_edges() -> None:
    places = _Places([0, 0.01, 0.1, 1.0, math.inf])
    where = [places.of(value) for value in (0, 0.01, 0.1, 1.0, math.inf)]
    assert where == sorted(where) and where[1:4] == [-2, -1, 0]
    assert where[0] < places.edges[0] < where[1] and where[3] < places.edges[1] < where[4]
    assert places.ticks()[1] == ["0", "0.01", "0.1", "1.0", "inf"]
    assert [_Places([1, 2, 4]).of(value) for value in (1, 2, 4)] == [1, 2, 4]
    assert [_Places(["mean", "sum"]).of(value) for value in ("mean", "sum")] == [0, 1]
    assert [_Places([True, False]).of(value) for value in (True, False)] == [0, 1]
    assert _Places([math.inf]).of(math.inf) == 1.0


def test_figures_of_a_grid(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        arms={"a": {}, "b": {"estep.horizon": 1}},
        grid={"estep.latent_price": [0, 0.01, 0.1, math.inf], "estep.likelihood": ["mean", "sum"]},
    )
    cells = make(study, {})
    price, likelihood = draw_figures(study, finished(study.path, cells))
    assert [price.name, likelihood.name] == ["against-estep.latent_price", "against-estep.likelihood"]
    axes = price.figure.axes
    assert len(axes) == 3
    labels = [text.get_text() for text in axes[0].get_xticklabels()]
    assert labels == ["0", "0.01", "0.1", "inf"]
    names = {curve.get_label() for curve in axes[0].get_lines() if not str(curve.get_label()).startswith("_")}
    assert names == {"a,likelihood=mean", "a,likelihood=sum", "b,likelihood=mean", "b,likelihood=sum"}


def test_the_ring_is_around_the_best_point(tmp_path: Path) -> None:
    plot = {"x": "think_rate", "y": ["code_ce", "code_accuracy"], "optimum": True}
    study = study_of(tmp_path, grid={"estep.horizon": [1, 2, 3]}, plots=[plot])
    cells = cells_of(study)
    make(study, {}, without=tuple(cell.name for cell in cells))
    for cell, gain in zip(cells, (0.1, 0.5, 0.3), strict=True):
        finish(cell, cell.folder(study.path), "ra3", gain, rate=gain)
    (picture,) = draw_figures(study, finished(study.path, cells))
    for axes in picture.figure.axes:
        (ring,) = [curve for curve in axes.get_lines() if curve.get_markersize() == 12]
        assert ring.get_xdata()[0] == 0.5
        assert [text.get_text() for text in axes.texts] == ["ring: ra3,horizon=2"]


def test_cells_without_lines_are_left_out_of_differences(tmp_path: Path) -> None:
    study = two_arms(tmp_path)
    cells = make(study, {})
    for file in study.path.glob("cells/ra3*/evaluations/ra3-2.lines.jsonl"):
        file.unlink()
    assert differences(study, cells, finished(study.path, cells)) == []
    assert (study.path / STUDY_FILE).is_file() and build_study_report(study.path).is_file()
