"""Which updates are taken, skipped, or stop a run: pure decisions."""

from __future__ import annotations

import json
import math

import pytest

from ra3_megatron.config.training import MonitorConfig
from ra3_megatron.mcore.trainer import NonFiniteLoss, RefusedStep
from ra3_megatron.training.spikes import Spikes, spike


def test_a_spike_is_above_the_factor_times_the_median_of_a_full_window() -> None:
    taken = [100.0, 1.0, 3.0, 2.0, 50.0]  # the last three: median 3
    assert spike(30.0, taken, factor=10, window=3) == ""
    assert spike(30.01, taken, factor=10, window=3) == (
        "gradient norm 30.01 is above 10 times 3, the median of the last 3 updates"
    )
    assert spike(1e9, taken, factor=10, window=6) == "", "the window is not full"
    assert spike(1e9, [0.0] * 9, factor=10, window=5) == "", "without advantages there is no usual norm"


def test_what_is_skipped_is_no_part_of_the_median() -> None:
    spikes = Spikes(MonitorConfig(spike="skip", spike_factor=2.0, spike_window=2, max_skips=9))
    norms = [1.0, 1.0, 5.0, 5.0, 2.0, 1.0]
    assert [bool(spikes.judge(0.0, norm)) for norm in norms] == [False, False, True, True, False, False]
    assert len(spikes.skipped()) == 2 and spikes.skipped() == []
    assert spikes.state_dict() == {"norms": [2.0, 1.0], "in_a_row": 0}


@pytest.mark.parametrize(("loss", "norm", "said"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "norm is inf")])
def test_what_is_not_finite_stops_or_is_skipped(loss: float, norm: float, said: str) -> None:
    with pytest.raises(NonFiniteLoss, match=said):
        Spikes(MonitorConfig()).judge(loss, norm)
    skipping = Spikes(MonitorConfig(nonfinite="skip"))
    assert said in skipping.judge(loss, norm)
    assert skipping.judge(loss, 1.0) == "" if math.isfinite(loss) else skipping.judge(1.0, 1.0) == ""
    assert skipping.state_dict()["norms"] == [1.0]


def test_a_spike_may_stop_or_be_taken() -> None:
    for action, outcome in (("stop", RefusedStep), ("off", None)):
        spikes = Spikes(MonitorConfig(spike=action, spike_window=2))
        spikes.judge(0.0, 1.0), spikes.judge(0.0, 1.0)
        if outcome is None:
            assert spikes.judge(0.0, 1e9) == ""
            continue
        with pytest.raises(outcome, match="is above 10 times 1"):
            spikes.judge(0.0, 1e9)


def test_skips_in_a_row_are_bounded_across_a_resume() -> None:
    config = MonitorConfig(nonfinite="skip", max_skips=2)
    spikes = Spikes(config)
    for value in (math.nan, 1.0, math.nan, math.nan):
        spikes.judge(value, 1.0)
    resumed = Spikes(config)
    resumed.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    for each in (spikes, resumed):
        with pytest.raises(RefusedStep, match=r"loss is nan, and 2 updates before it were skipped \(monitors.max_skip"):
            each.judge(math.nan, 1.0)
