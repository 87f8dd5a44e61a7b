"""Equal FLOPs: steps that cost what E-steps, infusions and M-steps did, by hand; figures that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_study import make, study_of

from ra3_megatron.config.errors import UserError
from ra3_megatron.study.flops import equal_steps, known_flops, with_equal_flops
from ra3_megatron.study.plan import resolve
from ra3_megatron.study.state import prepare


def write(folder: Path, phases: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: {"flops": flops} if flops is not None else {} for name, flops in phases.items()}
    (folder / "summary.json").write_text(json.dumps({"phases": values}))


def test_steps_by_hand(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"ra3": {}, "ntp": {"equal_flops": "ra3", "settings": {"method": "ntp"}}})
    configs = resolve(study, make(study, {}))
    ra3, ntp = configs["ra3,seed=1"], configs["ntp,seed=1"]
    assert ra3.mstep.steps == 4
    phases = {"warm_start": 9e9, "estep-1": 100.0, "infuse-1": 20.0, "mstep-1": 40.0, "ntp-1": 7.0}
    write(tmp_path / "r", phases)
    assert equal_steps(tmp_path / "r", ra3, 1) == 16  # 160 FLOPs at 10 a step
    assert equal_steps(tmp_path / "r", ra3, 3) == 6  # 16 / 3, rounded up
    prepare(tmp_path / "r", ra3)
    assert with_equal_flops(ntp, tmp_path / "r").mstep.steps == 16
    several: dict[str, Any] = {"em": ntp.em.model_copy(update={"iterations": 3})}
    assert with_equal_flops(ntp.model_copy(update=several), tmp_path / "r").mstep.steps == 6
    several["mstep"] = ntp.mstep.model_copy(update={"start": "base"})  # the last model has seen its own M-step alone
    assert with_equal_flops(ntp.model_copy(update=several), tmp_path / "r").mstep.steps == 16
    write(tmp_path / "r", {**phases, "estep-2": 101.0, "infuse-2": 20.0, "mstep-2": 40.0})
    assert equal_steps(tmp_path / "r", ra3, 2) == 17  # 321 / 10 / 2 = 16.05
    write(tmp_path / "r", {"ntp-1": 30.0, "warm_start": 1.0})
    assert equal_steps(tmp_path / "r", ntp, 1) == 4


def test_missing_flops_name_the_file(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    (config,) = resolve(study, make(study, {})).values()
    write(tmp_path / "r", {"mstep-1": 1.0, "estep-1": None})
    with pytest.raises(UserError, match=r"r/summary.json: phases.estep-1.flops is missing"):
        equal_steps(tmp_path / "r", config, 1)
    write(tmp_path / "r", {"warm_start": 1.0})
    with pytest.raises(UserError, match=r"r/summary.json: holds no M-step"):
        equal_steps(tmp_path / "r", config, 1)


def test_cumulative_flops() -> None:
    phases = {"warm_start": {"flops": 5}, "estep-1": {"flops": 1}, "mstep-1": {"flops": 2}, "mstep-2": {"flops": 4}}
    assert [known_flops(phases, "ra3", i) for i in range(3)] == [5, 3, 7]
    assert known_flops({**phases, "estep-1": {"flops": None}}, "ra3", 1) is None
    assert known_flops({}, "ra3", 0) is None
