"""Comparisons of nodes, without processes: rates, clocks, software, room, and how results are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ra3_megatron.cluster import clock, collective, disk, software, table
from ra3_megatron.cluster.results import Limits, Result


def test_every_pair_of_the_ring_is_tried_once_and_no_node_twice_at_a_time() -> None:
    assert collective.pair_rounds(1) == [] and collective.pair_rounds(2) == [[(0, 1)]]
    for count in range(3, 12):
        rounds = collective.pair_rounds(count)
        assert sorted(pair for pairs in rounds for pair in pairs) == [(i, (i + 1) % count) for i in range(count)]
        for pairs in rounds:
            nodes = [node for pair in pairs for node in pair]
            assert len(nodes) == len(set(nodes)), count


@pytest.mark.parametrize("count", [3, 4, 7])
def test_the_node_whose_pairs_are_all_slow_is_found(count: int) -> None:
    def rates(*slow: int) -> dict[tuple[int, int], float]:
        return {
            (one, other): 2.0 if {one, other} & set(slow) else 20.0 + one
            for pairs in collective.pair_rounds(count)
            for one, other in pairs
        }

    for node in range(count):
        assert collective.slow_nodes(rates(node), 10.0) == [node]
        if count > 3:
            assert collective.slow_nodes(rates(node), 1.0) == [node], "slow against the others"
    assert collective.slow_nodes(rates(), 10.0) == []
    assert collective.slow_nodes(rates(), 100.0) == list(range(count))


def test_rates_are_judged() -> None:
    nodes = ["a", "b", "c"]
    assert {each.state for each in collective.judge(3.0, nodes, None, {})} == {"ok"}
    assert {each.state for each in collective.judge(10.0, nodes, 10.0, {})} == {"ok"}
    slow = collective.judge(3.0, nodes, 10.0, {(0, 1): 2.0, (1, 2): 2.5, (2, 0): 20.0})
    assert [each.state for each in slow] == ["ok", "bad", "ok"]
    assert slow[1].text == "3.00 GB/s over all processes, should be 10 (--min-bus-gbs); 2.00 with a, 2.50 with c"
    none = collective.judge(3.0, nodes, 10.0, {(0, 1): 20.0, (1, 2): 20.0, (2, 0): 20.0})
    assert [each.state for each in none] == ["bad"] * 3 and "no node stands out" in none[0].text
    (single,) = collective.judge(3.0, ["a"], 100.0, {})
    assert (single.state, single.text) == ("bad", "3.00 GB/s over all processes, should be 100 (--min-bus-gbs)")


def test_the_floor_is_for_gpus_unless_it_is_given() -> None:
    assert collective.floor(Limits(), cuda=False, nodes=2) is None
    assert collective.floor(Limits(), cuda=True, nodes=2) == 10
    assert collective.floor(Limits(), cuda=True, nodes=1) == 100
    assert collective.floor(Limits(min_bus_gbs=0.5), cuda=False, nodes=2) == 0.5


def test_the_quickest_answer_tells_the_time_best() -> None:
    slow, quick = (0.0, 107.0, 10.0), (20.0, 120.6, 21.0)
    seconds, error = clock.offset([slow, quick])
    assert seconds == pytest.approx(100.1) and error == pytest.approx(0.5)
    assert clock.judge("n", 5.4, 0.3, 5.0).state == "bad" and clock.judge("n", -5.4, 0.3, 5.0).state == "bad"
    assert clock.judge("n", 5.2, 0.3, 5.0).state == "ok", "it may be within the limit"
    assert clock.judge("n", 5.4, 0.3, 5.0).text == (
        "+5.400 s (± 0.300) against the first node, should be within 5 s (--max-skew): is NTP running?"
    )


def test_differing_software_is_named() -> None:
    same: dict[str, Any] = {"ra3_megatron": "0.4", "torch": "2.11", "driver": "550", "processor": "x"}
    other = same | {"torch": "2.10", "driver": None, "processor": "y"}
    found = software.compare({"n1": same, "n2": same, "n3": other})
    assert [(each.node, each.state) for each in found] == [
        ("n1", "ok"),
        ("n2", "ok"),
        ("n3", "bad"),
        ("n3", "bad"),
        ("n3", "warn"),
    ]
    assert found[2].text == "torch 2.10, but 2.11 on n1" and found[3].text == "driver none, but 550 on n1"
    mine = software.collect("550")
    assert mine["driver"] == "550" and mine["torch"] and mine["ra3_megatron"] and "git commit" in mine


def test_room(tmp_path: Path) -> None:
    good = disk.room("n1", "run folder", tmp_path, 0.0, "--min-free-gib")
    bad = disk.room("n1", "run folder", tmp_path, 1e9, "--min-free-gib")
    assert good.state == "ok" and bad.state == "bad" and bad.text.endswith("should be 1e+09 (--min-free-gib)")
    assert disk.existing(tmp_path / "a" / "b") == tmp_path
    checked = disk.check("n1", tmp_path / "no" / "run", Limits(min_free_gib=1e9, min_tmp_gib=0))
    assert [each.state for each in checked[:2]] == ["bad", "ok"]
    assert disk.room("n1", "/dev/shm", tmp_path, 1e9, "", "warn").state == "warn"


def test_the_table_has_a_row_a_node_and_a_line_a_problem() -> None:
    results = [
        Result("n1", "clock", "ok", "fine", "0"),
        Result("n2", "clock", "bad", "+9.0 s, should be within 5 s", "+9.000"),
        Result("n1", "/dev/shm", "warn", "0.5 GiB", "0.5"),
        Result("n2", "/dev/shm", "ok", "2 GiB", "2.0"),
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(results, {"n1": 2, "n2": 2}, console)
    assert [line.split() for line in console.export_text().splitlines()] == [
        ["preflight"],
        ["node", "processes", "clock,", "s", "/dev/shm,", "GiB"],
        ["n1", "2", "0", "0.5"],
        ["n2", "2", "+9.000", "2.0"],
        ["node", "n2:", "clock:", "+9.0", "s,", "should", "be", "within", "5", "s"],
        ["warning:", "node", "n1:", "/dev/shm:", "0.5", "GiB"],
    ]
