"""Cells of a study: names, order, what waits for what, resolved configurations, what a folder may hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_study import finish, make, study_of

from ra3_megatron.config.differences import differences
from ra3_megatron.config.errors import UserError
from ra3_megatron.study.plan import cells_of, resolve, same_corpus
from ra3_megatron.study.state import conflicts, last_line, prepare, stage, with_threads

SETTINGS = {"estep.policy": "{ra3}/checkpoints/estep-1/final", "mstep.latents": "shuffled"}
SHUFFLED = {"after": "ra3", "settings": SETTINGS}


def test_names_order_and_waiting(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        seeds=[1, 2],
        base={},
        arms={"late": SHUFFLED, "ntp": {"method": "ntp"}, "ra3": {}},
    )
    cells = cells_of(study)
    assert [cell.name for cell in cells[:4]] == ["base,seed=1", "ra3,seed=1", "late,seed=1", "ntp,seed=1"]
    assert [cell.name for cell in cells[4:]] == [cell.name.replace("=1", "=2") for cell in cells[:4]]
    assert cells[2].after == ("base,seed=1", "ra3,seed=1") and cells[6].after == ("base,seed=2", "ra3,seed=2")
    assert cells[2].folder(Path("x")) == Path("x/cells/late,seed=1")


def test_a_shared_base_is_one_run(tmp_path: Path) -> None:
    cells = cells_of(study_of(tmp_path, seeds=[5, 2], base={}, shared_base=True))
    assert [cell.name for cell in cells] == ["base,seed=5", "ra3,seed=5", "ra3,seed=2"]
    assert all(cell.after == ("base,seed=5",) for cell in cells[1:])


def test_keys_are_shortened_as_far_as_they_stay_apart(tmp_path: Path) -> None:
    grid = {"estep.micro_batch_size": [1], "mstep.micro_batch_size": [1], "estep.latent_price": [0.05, float("inf")]}
    names = [cell.name for cell in cells_of(study_of(tmp_path, grid=grid))]
    start = "ra3,estep.micro_batch_size=1,mstep.micro_batch_size=1"
    assert names == [f"{start},latent_price=0.05,seed=1", f"{start},latent_price=inf,seed=1"]


def test_values_become_safe_names_and_clashes_are_refused(tmp_path: Path) -> None:
    cells = cells_of(study_of(tmp_path, grid={"corpus.path": ["a b/*.py", None]}))
    assert [cell.name for cell in cells] == ["ra3,path=a-b-.py,seed=1", "ra3,path=null,seed=1"]
    with pytest.raises(UserError, match="cells of the same name: ra3,path=a-b,seed=1"):
        cells_of(study_of(tmp_path, grid={"corpus.path": ["a b", "a/b"]}))


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    found = cells_of(study_of(tmp_path, arms={"a" * 248: {}}))
    assert [len(cell.name) for cell in found] == [255]
    with pytest.raises(UserError, match="its name has 256 characters, and that of a folder at most 255"):
        cells_of(study_of(tmp_path, arms={"a" * 249: {}}))


def test_placeholders_follow_seed_and_grid_point(tmp_path: Path) -> None:
    arms = {"ra3": {}, "late": SHUFFLED, "off": {"settings": SETTINGS, "grid": {"estep.horizon": [2]}}}
    study = study_of(tmp_path, seeds=[1, 2], arms=arms, grid={"estep.latent_price": [0, 0.5]})
    cells = cells_of(study)
    configs = resolve(study, cells)
    for seed in (1, 2):
        for price in ("0", "0.5"):
            expected = f"{tmp_path}/out/cells/ra3,latent_price={price},seed={seed}/checkpoints/estep-1/final"
            assert configs[f"late,latent_price={price},seed={seed}"].estep.policy == expected
            assert configs[f"off,latent_price={price},horizon=2,seed={seed}"].estep.policy == expected


def test_a_placeholder_without_one_cell_is_refused(tmp_path: Path) -> None:
    arms = {"ra3": {"grid": {"estep.horizon": [1, 2]}}, "late": SHUFFLED}
    with pytest.raises(UserError, match="late,seed=1 needs one cell of ra3, at the same grid point, and there are 2"):
        cells_of(study_of(tmp_path, arms=arms))


def test_later_settings_win(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        seeds=[7],
        settings={"estep": {"steps": 3, "horizon": 3}, "em.control": True},
        arms={"ra3": {"settings": {"estep.steps": 4, "estep.latent_price": 1.0}, "grid": {"estep.latent_price": [2]}}},
    )
    (cell,) = cells_of(study)
    config = resolve(study, [cell])[cell.name]
    assert (config.estep.steps, config.estep.horizon, config.estep.latent_price) == (4, 3, 2)
    assert config.em.control and config.seed == 7 and config.mstep.steps == 4
    assert config.run_dir == str(tmp_path / "out" / "cells" / "ra3,latent_price=2,seed=7")


def test_cells_start_from_the_base_with_its_tokenizer(tmp_path: Path) -> None:
    arms = {"ra3": {}, "other": {"text.granularity": "statement"}, "own": {"tokenizer.vocab_size": 400}}
    study = study_of(tmp_path, base={"warm_start.steps": 50, "tokenizer.vocab_size": 350}, arms=arms)
    cells = cells_of(study)
    configs = resolve(study, cells)
    base, ra3, other, own = (configs[f"{name},seed=1"] for name in ("base", "ra3", "other", "own"))
    folder = tmp_path / "out" / "cells" / "base,seed=1"
    assert (base.warm_start.steps, base.em.iterations) == (50, 0)
    for config in (ra3, other, own):
        assert config.warm_start.checkpoint == str(folder / "checkpoints" / "warm_start" / "final")
        assert (config.warm_start.steps, config.em.iterations) == (0, 1)
    assert ra3.tokenizer == base.tokenizer and same_corpus(ra3, base)
    assert other.tokenizer.path == str(folder / "corpus" / "tokenizer") and not same_corpus(other, base)
    assert other.tokenizer.vocab_size == 350 and own.tokenizer.vocab_size == 400


def test_a_base_beside_a_hugging_face_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ra3_megatron.hf import families

    monkeypatch.setattr(families, "read_folder", lambda folder: (None, {}, 64))
    study = study_of(tmp_path, base={}, settings={"model.hf": "hf", "model.context_length": 64, "tokenizer.kind": "hf"})
    with pytest.raises(UserError, match=r"base: does not go with model\.hf=hf"):
        resolve(study, cells_of(study))


def test_equal_flops_needs_equal_steps(tmp_path: Path) -> None:
    arms = {"ra3": {}, "more": {"equal_flops": "ra3", "settings": {"mstep.global_batch_size": 8}}}
    study = study_of(tmp_path, arms=arms)
    with pytest.raises(UserError, match=r"cell more,seed=1: mstep.global_batch_size=8: with equal_flops it must be"):
        resolve(study, cells_of(study))


def test_a_folder_with_another_run_is_a_conflict(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=[1, 2])
    cells = make(study, {}, without=("ra3,seed=2",))
    configs = resolve(study, cells)
    assert list(conflicts(study.path, cells, configs)) == []
    changed = study_of(tmp_path, seeds=[1, 2], settings={"estep.horizon": 2, "logging.interval": 7})
    (line,) = conflicts(study.path, cells, resolve(changed, cells))
    folder = study.path / "cells" / "ra3,seed=1"
    assert line == (
        f"cell ra3,seed=1: its folder holds a run with estep.horizon=4, and the study asks for 2: set it back, "
        f"delete {folder}, or choose another folder for the study"
    )
    assert [
        difference.key for difference in differences(configs["ra3,seed=1"], resolve(changed, cells)["ra3,seed=1"])
    ] == ["estep.horizon"]
    assert list(conflicts(study.path, cells, resolve(changed, cells), frozenset({"ra3,seed=1"}))) == [line]
    (folder / "config.yaml").write_text("estep: {stepz: 1}")
    (line,) = conflicts(study.path, cells, configs)
    assert line.startswith("cell ra3,seed=1: estep.stepz: unknown key")


def test_a_run_without_checkpoints_has_nothing_to_lose(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    cells = cells_of(study)
    configs = resolve(study, cells)
    folder = cells[0].folder(study.path)
    prepare(folder, configs["ra3,seed=1"])
    other = resolve(study_of(tmp_path, settings={"estep.horizon": 2}), cells)
    assert stage(folder) == "new" and list(conflicts(study.path, cells, other)) == []
    prepare(folder, other["ra3,seed=1"])
    assert "horizon: 2" in (folder / "config.yaml").read_text()
    (folder / "checkpoints").mkdir()
    assert stage(folder) == "begun" and len(list(conflicts(study.path, cells, configs))) == 1
    prepare(folder, configs["ra3,seed=1"])
    assert "horizon: 2" in (folder / "config.yaml").read_text()  # the run's own word is not overwritten
    shutil.rmtree(folder)
    finish(cells[0], folder, "ra3", 0.1)
    assert stage(folder) == "done"


def test_threads_are_the_share_of_a_cell_unless_the_study_says(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {"parallel.threads": 5}})
    configs = resolve(study, cells_of(study))
    assert with_threads(configs["a,seed=1"], 2).parallel.threads == 2
    assert with_threads(configs["b,seed=1"], 2).parallel.threads == 5
    assert differences(configs["a,seed=1"], with_threads(configs["a,seed=1"], 2)) == []


def test_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_line(log) == "no output"
    log.write_bytes(b"x\n" * 70000 + b"ra3: what was wrong\xff\n\n")
    assert last_line(log) == "ra3: what was wrong\ufffd"
