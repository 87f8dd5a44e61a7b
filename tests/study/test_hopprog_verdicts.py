"""Verdicts of the predictions, from held-out lines that are made by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_study import make, study_of

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.report.held_out import DocumentFigures, LineFigures, lines_file, write_held_out
from ra3_megatron.report.run_folder import read_json
from ra3_megatron.study.hopprog.figures import draw_figures
from ra3_megatron.study.hopprog.groups import PRICE, Group, groups_of
from ra3_megatron.study.hopprog.page import TRUTH
from ra3_megatron.study.hopprog.verdicts import FEW_THOUGHTS, _slope, _staircase, verdicts
from ra3_megatron.study.predictions import Verdict, above, below, both, estimate
from ra3_megatron.study.report import build_study_report
from ra3_megatron.study.results import finished
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.families import build_family
from ra3_megatron.tasks.measures import Line
from ra3_megatron.tasks.task import Task

SETTINGS = {"count": 40, "min_items": 2}
FAMILY = build_family(TasksConfig(min_items=2))
TASKS = [FAMILY.task(number, training=True) for number in range(40)]
FREE = dict.fromkeys(range(4), True)
NLL = {"thinking": 0.05, "plain": 0.6}


def documents(thinks: bool, right: bool = True, inside: bool = False, plain: float = 0.6) -> list[DocumentFigures]:
    """Held-out lines of a model that thinks at boundaries (and inside) or not at all, and can do h = 0 without."""
    found = []
    for number, task in enumerate(TASKS):
        texts = task.code.removeprefix(task.prompt).splitlines(keepends=True)
        found.append(
            DocumentFigures(
                document=task.name,
                sample=0,
                lines=[
                    _line(task, n, text, thinks, right, inside, plain + number / 1000) for n, text in enumerate(texts)
                ],
            )
        )
    return found


def _line(task: Task, n: int, text: str, thinks: bool, right: bool, inside: bool, plain: float) -> LineFigures:
    truth = task.truth[n]
    thought = thinks and truth.item is not None and (truth.boundary or inside)
    return LineFigures(
        text=text,
        thought=("# " + (truth.thought if right else "9")) if thought else None,
        offered=True,
        tokens=3,
        nll=NLL["thinking"] if thinks and right else plain,
        raw_nll=plain,
        greedy=(thinks and right) or truth.hops == 0,
        raw_greedy=truth.hops == 0,
        layout_nll=0.0,
        raw_layout_nll=0.0,
    )


def judged(folder: Path, seeds: int = 3, **ra3: Any) -> dict[str, Verdict]:
    """Verdicts of a study with ntp and ra3; ra3: what its lines are like."""
    arms = {"gate": {"em.iterations": 0}, "ntp": {"method": "ntp"}, "ra3": {}}
    settings = {"corpus": {"source": "tasks", "path": None, "tasks": SETTINGS}}
    study = study_of(folder, arms=arms, seeds=list(range(1, seeds + 1)), settings=settings, sections="hopprog")
    cells = make(study, {})
    for cell in cells:
        place = cell.folder(study.path)
        write_held_out(lines_file(place, "base", 0), documents(thinks=True))
        if cell.arm == "gate":
            continue
        kept = documents(thinks=False) if cell.arm == "ntp" else documents(**{"thinks": True, **ra3})
        write_held_out(lines_file(place, cell.arm, 1), kept)
    build_study_report(study.path)
    written = read_json(study.path / TRUTH)["predictions"]
    found = {verdict.name: verdict for verdict in verdicts(groups_of(finished(study.path, cells)))}
    assert {row["name"]: row["word"] for row in written} == {name: verdict.word for name, verdict in found.items()}
    return found


def words(found: dict[str, Verdict]) -> dict[str, str]:
    return {name.split()[0]: verdict.word for name, verdict in found.items()}


def word_of(name: str, groups: dict[str, Group]) -> str:
    """The word of one verdict on these groups."""
    return words({verdict.name: verdict for verdict in verdicts(groups)})[name]


def test_what_right_looks_like(tmp_path: Path) -> None:
    verdicts_ = judged(tmp_path)
    found = words(verdicts_)
    assert verdicts_["P1 selectivity"].seen.endswith("; before lines outside of items 0.000 [0.000, 0.000]")
    assert (found["Gate"], found["P1"], found["Gain"], found["P4"]) == ("confirmed",) * 4
    assert (found["P2"], found["P3"], found["P5"], found["N1"], found["N2"]) == ("not run",) * 5


@pytest.mark.parametrize(
    ("wrong", "refuted"),
    [
        ({"thinks": False}, ["P1", "Gain"]),
        ({"right": False}, ["Gain"]),
        ({"inside": True}, ["P1", "P4"]),
    ],
)
def test_what_wrong_looks_like(tmp_path: Path, wrong: dict[str, Any], refuted: list[str]) -> None:
    found = words(judged(tmp_path, **wrong))
    assert [name for name in ("P1", "Gain", "P4") if found[name] == "refuted"] == refuted
    if wrong == {"thinks": False}:
        assert found["P4"] == "undecided", "no thought has a duration"


def _lines(held_out: list[DocumentFigures]) -> list[Line]:
    truths = {task.name: task for task in TASKS}
    return measures.lines_of(held_out, truths.__getitem__)


def base(easy: int, hard: int, right: int) -> list[Line]:
    """First lines of a base, 100 of items of 0 hops and as many of 3: written without a thought, and right thoughts."""
    lines = [line for line in _lines(documents(thinks=True)) if line.truth.boundary]
    found = []
    for hops, written in ((0, easy), (3, hard)):
        one = next(line for line in lines if line.truth.hops == hops)
        found += [
            replace(one, figures=replace(one.figures, raw_greedy=n < written), right_thought=n < right)
            for n in range(100)
        ]
    return found


@pytest.mark.parametrize(
    ("seeds", "word"),
    [
        ([(95, 49, 95)], "confirmed"),
        ([(94, 0, 100)], "refuted"),
        ([(100, 50, 100)], "refuted"),
        ([(100, 0, 94)], "refuted"),
        ([(95, 49, 95), (100, 0, 100), (94, 0, 100)], "refuted"),
    ],
)
def test_a_base_has_to_pass_every_part_of_the_gate(seeds: list[tuple[int, int, int]], word: str) -> None:
    runs = {seed: base(*each) for seed, each in enumerate(seeds, 1)}
    found = verdicts({"gate": Group("gate", {}, {}, runs)})[0]
    assert (found.name, found.word) == ("Gate", word)
    easy, hard, right = (share / 100 for share in seeds[-1])
    assert found.seen.endswith(f"h=0 {easy:.3f}, h=3 {hard:.3f}; thoughts right {right:.3f}")


@pytest.mark.parametrize("left", [0, 3])
def test_a_base_without_easy_or_hard_items_or_thoughts_fails_the_gate(left: int) -> None:
    some = [line for line in base(100, 0, 100) if line.truth.hops == left]
    silent = [replace(line, right_thought=None) for line in base(100, 0, 100)]
    for lines in (some, silent):
        assert verdicts({"gate": Group("gate", {}, {}, {1: lines})})[0].word == "refuted"


def costing(nats: dict[str, float], apart: tuple[float, ...] = (0.0, 0.001, 0.002)) -> dict[str, Group]:
    """Arms whose lines cost so many nats each, and in each seed so many more in all arms."""
    lines = _lines(documents(thinks=False))
    groups = {}
    for name, value in nats.items():
        runs = {
            seed: [replace(line, figures=replace(line.figures, nll=value + more)) for line in lines]
            for seed, more in enumerate(apart, 1)
        }
        groups[name] = Group(name, {}, {}, runs)
    return groups


@pytest.mark.parametrize(
    ("apart", "word"), [((0.0, 0.0, 0.0), "confirmed"), ((0.0, 0.1, 0.2), "confirmed"), ((0.0, 1.0, 2.0), "refuted")]
)
def test_a_gain_needs_intervals_that_are_disjoint(apart: tuple[float, ...], word: str) -> None:
    """Seeds differ by so many nats a line, in both arms: the difference is the same in each."""
    groups = costing({"ntp": 1.0, "ra3": 0.5}, apart)
    assert word_of("Gain", groups) == word


@pytest.mark.parametrize(
    ("gain", "word"), [(0.0, "confirmed"), (-0.5, "confirmed"), (0.019, "confirmed"), (0.021, "refuted")]
)
def test_nothing_is_gained_where_nothing_can_be_computed(gain: float, word: str) -> None:
    groups = costing({"null_ntp": 1.0, "null_ra3": 1.0 - gain})
    assert word_of("N1", groups) == word
    for name in groups:
        one = {name: groups[name]}
        assert word_of("N1", one) == "not run"


@pytest.mark.parametrize(("deep_gain", "word"), [(0.2, "confirmed"), (0.4, "refuted")])
def test_a_deeper_model_is_to_gain_less(deep_gain: float, word: str) -> None:
    """The other one gains 0.3 nats a line."""
    groups = costing({"ntp": 1.0, "ra3": 0.7, "deep_ntp": 0.8, "deep_ra3": 0.8 - deep_gain})
    found = {verdict.name.split()[0]: verdict for verdict in verdicts(groups)}["N2"]
    assert found.word == word and found.seen.startswith(f"gain lost {0.3 - deep_gain:.3f}")
    for name in ("deep_ntp", "deep_ra3"):
        fewer = {key: group for key, group in groups.items() if key != name}
        assert word_of("N2", fewer) == "not run"


def test_the_slope_is_that_of_least_squares() -> None:
    points = {2: 1.5, 4: 4.0, 5: 3.0, 9: 7.5}
    assert _slope(points) == pytest.approx(np.polyfit(list(points), list(points.values()), 1)[0])
    assert _slope({3: 1.0, 5: 2.0}) == 0.5
    assert _slope({3: 1.0}) is _slope({}) is None


def granular(*arms: str, plain: float = 1.2) -> str:
    """P6's word when these arms think at boundaries and NTP's lines cost `plain` nats."""
    truths = {task.name: task for task in TASKS}
    groups = {}
    for name in ("ntp", *arms):
        documents_ = documents(thinks=name != "ntp", plain=plain)
        lines = {seed: measures.lines_of(documents_, truths.__getitem__) for seed in (1, 2, 3)}
        groups[name] = Group(name, {}, {}, lines)
    return word_of("P6", groups)


@pytest.mark.parametrize(("thinks", "word"), [(True, "confirmed"), (False, "undecided")])
def test_thoughts_that_are_not_there_mean_nothing(thinks: bool, word: str) -> None:
    """Whether lines follow transplanted thoughts can be told of a model that does not think by itself."""
    truths = {task.name: task for task in TASKS}
    groups = {
        name: Group(name, {}, {}, {seed: measures.lines_of(held, truths.__getitem__) for seed in (1, 2, 3)})
        for name, held in {"ra3": documents(thinks=thinks), "transplant": documents(thinks=True)}.items()
    }
    assert word_of("P3", groups) == word


def test_a_handful_of_thoughts_tells_nothing_of_routines() -> None:
    """Each of them another one, at items of different routines: as if they told all, whatever they say."""
    transplant = Group("transplant", {}, {}, dict.fromkeys((1, 2, 3), _lines(documents(thinks=True))))

    def word(thoughts: int) -> str:
        left, found = thoughts, []
        for line in _lines(documents(thinks=True, right=False)):
            said = f"# {left}" if left and line.truth.boundary else None
            left -= said is not None
            found.append(replace(line, figures=replace(line.figures, thought=said and said[-3:])))
        groups = {"ra3": Group("ra3", {}, {}, dict.fromkeys((1, 2, 3), found)), "transplant": transplant}
        return word_of("P3", groups)

    assert word(3) == word(FEW_THOUGHTS - 1) == "undecided"
    assert word(FEW_THOUGHTS) == word(80) == "refuted"


def test_prices_of_tasks_with_many_hops_are_drawn() -> None:
    few = boundaries(FREE)[:3]
    lines = [replace(line, truth=replace(line.truth, hops=hops)) for hops in range(10) for line in few]
    groups = {f"price,latent_price={c}": Group("price", {PRICE: c}, {}, {1: lines}) for c in (0, 1, 2)}
    staircase = list(draw_figures(groups).values())[-1]
    assert len(staircase.axes[0].lines) == 10


def test_granularity_asks_for_a_gain_of_statements_and_tokens() -> None:
    assert granular("statement", "token") == "confirmed"
    assert granular("statement", "token", plain=0.3) == "refuted"
    assert granular("statement") == granular("token") == "not run"
    assert granular("statement", "token", "ntp_token") == "refuted", "NTP of the same base is the reference"


def boundaries(thinks: dict[int, bool]) -> list[Line]:
    """The boundaries of all tasks, where a thought saves 2 h nats, and these hops are thought at."""
    found = []
    for number, task in enumerate(TASKS):
        for n, truth in enumerate(task.truth):
            if truth.item is not None and truth.boundary:
                figures = replace(_line(task, n, "x", thinks[truth.hops], True, False, 0), raw_nll=2.0 * truth.hops)
                figures = replace(figures, nll=0.0 if thinks[truth.hops] else figures.raw_nll)
                found.append(Line(figures, truth, str(number), None))
    return found


def swept(recall: dict[float, dict[int, bool]], seeds: int = 3, base: dict[int, bool] = FREE) -> str:
    """P2's word when these hops are thought at for each price, and those by the base."""
    groups = {"gate": Group("gate", {}, {}, {1: boundaries(base)})}
    for price, thinks in recall.items():
        by_seed = {seed: boundaries(thinks) for seed in range(1, seeds + 1)}
        groups[f"price,latent_price={price}"] = Group("price", {PRICE: price}, {}, by_seed)
    return word_of("P2", groups)


def test_the_price_is_a_staircase_or_not() -> None:
    """Gains are 0, 2, 4 and 6 nats at 0 to 3 hops."""
    stairs = {0.0: FREE, 1.5: {0: False, 1: True, 2: True, 3: True}, 3.5: {0: False, 1: False, 2: True, 3: True}}
    assert swept(stairs) == "confirmed" and swept(stairs, seeds=2) == "undecided"
    assert swept(dict.fromkeys(stairs, FREE)) == "refuted", "thinks whatever it costs"
    never = dict.fromkeys(range(4), False)
    assert swept({0.0: FREE, 1.5: never, 3.5: never}) == "refuted", "is deterred by any price"
    assert swept({0.0: FREE, 1.5: never}) == "not run"
    assert swept(stairs, base=never) == "undecided", "what a base without thoughts would save is not known"


def test_hops_that_the_tasks_of_a_price_do_not_have_are_no_case() -> None:
    """Of no boundary at all every share is 1, as if it had been thought at."""
    free = boundaries(FREE)
    lines = {kept: [line for line in free if line.truth.hops in kept] for kept in ((1, 2, 3), (2,))}
    gains = {0: 0.0, 1: 2.0, 2: 4.0, 3: 6.0}
    assert _staircase(gains, [(0.1, lines[1, 2, 3]), (9.0, lines[1, 2, 3])]) == 3 / 5
    assert _staircase(gains, [(0.5, lines[2,])]) == 1.0 and _staircase(gains, [(9.0, lines[2,])]) == 0.0
    assert _staircase({1: 2.0}, [(0.5, lines[2,])]) is None


def test_a_case_is_clear_cut_from_twice_and_from_half_the_price() -> None:
    """At two hops all think: right where a thought saves more than twice its price, wrong below half of it."""
    all_think = [line for line in boundaries(FREE) if line.truth.hops == 2]
    found = {gain: _staircase({2: gain}, [(2.0, all_think)]) for gain in (0.9, 1.1, 3.9, 4.1)}
    assert found == {0.9: 0.0, 1.1: None, 3.9: None, 4.1: 1.0}
    silent = replace(all_think[0], figures=replace(all_think[0].figures, thought=None))
    for gain, thinking, word in ((4.1, 15, 0.0), (4.1, 17, 1.0), (0.9, 5, 0.0), (0.9, 3, 1.0)):
        mixed = [all_think[0]] * thinking + [silent] * (20 - thinking)
        assert _staircase({2: gain}, [(2.0, mixed)]) == word, "above 80%, below 20%"


def test_the_comparison_with_ntp_is_of_lines_of_items(tmp_path: Path) -> None:
    """Requests and the ending, which no thought can help with, would dilute it."""
    judged(tmp_path)
    arms = read_json(next(tmp_path.rglob(TRUTH)))["arms"]
    ntp, ra3 = (float(arms[name]["nats a line"].split()[0]) for name in ("ntp", "ra3"))
    assert float(arms["ra3"]["less than NTP (paired)"].split()[0]) == pytest.approx(ntp - ra3, abs=2e-3)


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = words(judged(tmp_path, seeds=1))
    assert found["P1"] == found["Gain"] == "undecided"


def test_words_of_intervals() -> None:
    high, wide, low = estimate([1.0, 1.01, 1.02]), estimate([0.0, 1.0, 0.5]), estimate([0.1, 0.11, 0.1])
    assert [above(found, 0.5) for found in (high, wide, low)] == ["confirmed", "undecided", "refuted"]
    assert [below(found, 0.5) for found in (high, wide, low)] == ["refuted", "undecided", "confirmed"]
    assert above(None, 0.5) == below(None, 0.5) == "not run" and above(estimate([9.0]), 0.5) == "undecided"
    assert both("confirmed", "undecided") == "undecided" and both("refuted", "undecided") == "refuted"
    assert both("not run", "refuted") == "not run" and both("confirmed", "confirmed") == "confirmed"
