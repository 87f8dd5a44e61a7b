"""Scaling studies: cells from options, efficiency by hand, refusals, and a real one on one and two processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from made_study import SMALL
from matplotlib.patches import Rectangle
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.errors import UserError
from ra3_megatron.report.numbers import ABSENT
from ra3_megatron.report.run_folder import read_json, write_json
from ra3_megatron.scaling.counts import token_flops
from ra3_megatron.scaling.memory import GIB
from ra3_megatron.scaling.tables import gpu_named
from ra3_megatron.study.scaling import jobs
from ra3_megatron.study.scaling.figures import _parts
from ra3_megatron.study.scaling.layouts import Family, layout_tag
from ra3_megatron.study.scaling.options import scaling_study
from ra3_megatron.study.scaling.points import Measured, measured
from ra3_megatron.study.scaling.prediction import described, planned
from ra3_megatron.study.scaling.report import write_report
from ra3_megatron.study.scaling.results import finished_cells, rows_of, scaled
from ra3_megatron.study.scaling.spec import SCALING_FILE, ScalingConfig, dump_scaling, load_scaling
from ra3_megatron.study.state import prepare
from tests.run.small_run import CONFIG, write_corpus

LINK = {"all_reduce_gb_s": 1.5, "message_gb_s": 2.0, "hop_seconds": 1e-4}


def ra3(*arguments: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small configuration: 4 rows a step, 2 a forward pass."""
    monkeypatch.chdir(tmp_path)
    batch = {"global_batch_size": 4, "micro_batch_size": 2}
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "warm_start": batch, "mstep": batch}))
    return Path("small.yaml")


def study_of(**given: Any) -> ScalingConfig:
    return scaling_study(Path("small.yaml"), {"folder": "out", "processes": "1,2", **given}, [])


def test_layouts_grow_with_the_processes() -> None:
    def sizes(text: str, processes: int) -> tuple[int, ...] | None:
        keys = Family.parse(text).at(processes)
        return None if keys is None else tuple(keys[axis] for axis in ("tensor", "pipeline", "context", "data"))

    assert sizes("data", 4) == (1, 1, 1, 4)
    assert sizes("tensor", 4) == (4, 1, 1, 1)
    assert sizes("tensor=2", 8) == (2, 1, 1, 4)
    assert sizes("tensor=2,pipeline", 8) == (2, 4, 1, 1)
    assert sizes("tensor=2", 3) is None and sizes("tensor=2,data=2", 8) is None
    assert sizes("tensor=2,data=2", 4) == (2, 1, 1, 2)
    family = Family.parse("tensor,sequence=true,micro_batch=1")
    assert family.micro_batch == 1 and "sequence" not in (family.at(1) or {}) and (family.at(2) or {})["sequence"]
    assert layout_tag(family.at(2) or {}, 1) == "tp2.sequence.mb1" and layout_tag(family.at(1) or {}) == "single"


@pytest.mark.parametrize("text", ["pipeline,virtual_pipeline=x", "pipeline,virtual_pipeline=0", "expert=[2]"])
def test_sizes_of_a_layout_are_numbers(text: str) -> None:
    with pytest.raises(UserError, match="must be a number, at least 1"):
        Family.parse(text)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (["a=num_layers:1", "a=num_layers:2"], "--sizes a=num_layers:2: a is named twice"),
        (["a=num_layers:1,num_layers:2"], "the same key stands twice"),
    ],
)
def test_no_size_is_dropped(sizes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scaling_study(Path("config.yaml"), {"folder": "out", "processes": "1", "sizes": sizes}, [])


def test_cells_from_options(small: Path) -> None:
    """What is the same training is measured once: one process has one layout, and weak scaling begins as strong."""
    found = measured(study_of(layouts="data; context", repeats=2))
    assert [(p.mode, p.layout, p.processes, p.batch, p.arm) for p in found.points] == [
        ("strong", "data", 1, 4, "as_configured-single-b4"),
        ("weak", "data", 1, 4, "as_configured-single-b4"),
        ("strong", "data", 2, 4, "as_configured-dp2-b4"),
        ("weak", "data", 2, 8, "as_configured-dp2-b8"),
        ("strong", "context", 1, 4, "as_configured-single-b4"),
        ("weak", "context", 1, 4, "as_configured-single-b4"),
        ("strong", "context", 2, 4, "as_configured-cp2-b4"),
        ("weak", "context", 2, 8, "as_configured-cp2-b8"),
    ]
    assert len(found.cells) == 2 * 5 and [cell.seed for cell in found.cells] == [1] * 5 + [2] * 5
    config = found.configs["as_configured-cp2-b8,seed=2"]
    assert (config.parallel.context, config.parallel.data, config.warm_start.global_batch_size) == (2, 1, 8)
    assert config.warm_start.steps == 12 + 3 and config.em.iterations == 0
    threads = {each.parallel.threads for each in found.configs.values()}
    assert len(threads) == 1 and None not in threads  # a process is the same device at every number of them
    sized = measured(study_of(sizes=["wide=hidden_size:32", "deep=num_layers:2"], mode="weak", batch=8))
    assert {point.arm for point in sized.points} == {
        f"{s}-{x}" for s in ("wide", "deep") for x in ("single-b8", "dp2-b16")
    }
    assert sized.configs["wide-dp2-b16,seed=1"].model.hidden_size == 32


def test_a_file_says_the_same(small: Path) -> None:
    study = study_of(layouts="data;tensor=2,pipeline", sizes=["wide=hidden_size:32"], estep=2, gpu="h100")
    Path("scaling.yaml").write_text(dump_scaling(study))
    assert load_scaling(Path("scaling.yaml")) == study
    again = scaling_study(Path("scaling.yaml"), {"steps": 5, "folder": None}, ["estep.group_size=4"])
    assert again == study.model_copy(update={"steps": 5, "settings": {"estep.group_size": 4}})


def test_the_example_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    study = load_scaling(Path("examples/scaling/h100-weak.yaml"))
    found = measured(study)
    groups = jobs.groups(study, found.cells, found.configs)
    assert [group.nodes for group in groups] == [2**n for n in range(10)]
    assert all(len(group.cells) == 2 * 3 and group.each == 8 for group in groups)
    rows = {c.parallel.world_size: c.warm_start.global_batch_size for c in found.configs.values()}
    assert rows == {8 * 2**n: 32 * 2**n for n in range(10)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "study scaling needs --folder, or the file"),
        (["--folder", "out"], "study scaling needs --processes, or the file"),
        (["--folder", "out", "--processes", "1,x"], "--processes 1,x: must be numbers"),
        (["--folder", "out", "--processes", "2,2"], "study scaling: processes=[2, 2]: must be different numbers"),
        (
            ["--folder", "out", "--processes", "1", "--layouts", "tensr"],
            "study scaling: layouts: tensr: tensr is no size",
        ),
        (
            ["--folder", "out", "--processes", "3", "--layouts", "tensor=2"],
            "study scaling: layouts: tensor=2: fits none of 3 processes",
        ),
        (["--folder", "out", "--processes", "1", "--gpu", "h1000"], "study scaling: --gpu h1000: neither a file"),
        (["--folder", "out", "--processes", "1", "--sizes", "x"], "--sizes x: must be a name and settings"),
        (["--folder", "out", "--processes", "1", "--sizes", "x=depth:2"], "study scaling: sizes: depth: unknown key"),
        (["--folder", "out", "--processes", "1", "--mode", "odd"], "study scaling: mode=odd: must be 'strong'"),
        (
            ["--folder", "out", "--processes", "6", "--processes-per-node", "4"],
            "study scaling: processes=6: more than a node and no multiple",
        ),
        (["--folder", "out", "--processes", "1", "--cell", "9"], "--cell 9: there are 3 cells"),
    ],
)
def test_mistakes_are_one_line(small: Path, options: list[str], line: str) -> None:
    result = ra3("study", "scaling", small, *options, code=2)
    assert result.stderr.startswith(f"ra3: {line}") and result.stderr.count("\n") == 1, result.stderr
    assert not Path("out").exists()


def test_a_layout_that_cannot_be_is_named(small: Path) -> None:
    result = ra3("study", "scaling", small, "--folder", "out", "--processes", "1,3", code=2)
    assert "warm_start" in result.stderr and "dp3" in result.stderr
    assert not Path("out").exists()


def test_efficiency_by_hand() -> None:
    # 8 s on one process, 2.5 s on four: 3.2 times as fast, of 4
    assert scaled("strong", 4, 8.0, 2.5) == pytest.approx((3.2, 0.8))
    # four times the rows in 10 s instead of 8: 3.2 times the tokens a second
    assert scaled("weak", 4, 8.0, 10.0) == pytest.approx((3.2, 0.8))


def made(study: ScalingConfig, seconds: dict[str, list[float]], **more: Any) -> Measured:
    """Cells as if they had been measured: seconds of the measured steps by the beginning of the cell's name."""
    found = measured(study)
    study.path.mkdir(exist_ok=True)
    (study.path / SCALING_FILE).write_text(dump_scaling(study))
    for cell in found.cells:
        times = next((values for name, values in seconds.items() if cell.name.startswith(name)), None)
        if times is None:
            continue
        config = found.configs[cell.name]
        folder = cell.folder(study.path)
        prepare(folder, config)
        tokens = config.warm_start.global_batch_size * config.model.context_length
        processes = config.parallel.world_size
        probe = {
            "device": "cpu",
            "tflops": {"fp32": 0.05, "bf16": 0.1},
            "shares": {"matmul": 0.8, "attention_forward": 0.2, "attention_backward": 0.3},
            "copy_gb_s": 10.0,
            "memory_gib": 8.0,
            "links": {}
            if processes == 1
            else {"node": {"all_reduce_gb_s": 1.5, "message_gb_s": 2.0, "hop_seconds": 1e-4}},
        }
        values = {
            "kind": "scaling",
            "rows": "full",
            "warmup": study.warmup,
            "busy_cores": 0.0,
            "processes": processes,
            "vocab_size": 330,
            "cores": 1,
            "threads": 1,
            "host_processes": processes,
            "nodes": ["a:0"],
            "memory": [{"rank": r, "before_gib": 0.25, "peak_gib": 0.5 + r} for r in range(processes)],
            "steps": [{"seconds": s, "tokens": tokens} for s in [99.0] * study.warmup + times],
            "layer_start_seconds": 2e-3 if processes == 1 else None,
            "probes": [probe] * processes,
        }
        write_json(folder / "summary.json", {**values, **more})
    return found


def test_rows_from_cells(small: Path) -> None:
    """Medians over repeats of medians over the steps behind the warm-up; the first that is done is what others are
    relative to; cells that are missing lose no others."""
    study = study_of(repeats=3, steps=3, processes="1,2,4", layouts="data,micro_batch=1", mode="strong")
    times = {
        "as_configured-single.mb1-b4,seed=1": [8.0, 8.0, 1.0],
        "as_configured-single.mb1-b4,seed=2": [6.0, 7.0, 90.0],
    }
    times["as_configured-single.mb1-b4,seed=3"] = [9.0, 9.0, 9.0]
    times["as_configured-dp4.mb1-b4,seed=2"] = [2.5, 2.0, 3.0]
    found = made(study, times)
    done = finished_cells(study.path, found)
    one, four = rows_of(found, done)
    assert vars(one.step_seconds) == {"median": 8.0, "low": 7.0, "high": 9.0} and one.efficiency == 1.0
    assert (four.point.processes, len(four.cells), four.relative_to) == (4, 1, 1)
    assert (four.speedup, four.efficiency) == pytest.approx((3.2, 0.8))
    (cell,) = four.cells
    assert cell.peak_gib == 3.5 and cell.oversubscribed and not one.cells[0].oversubscribed
    tokens = 4 * 64
    flops = 3 * tokens * sum(token_flops(cell.config.model, 330, 64).values())
    assert cell.mfu(None) == pytest.approx(flops / (2.5 * 4 * 0.05e12))
    assert cell.mfu(1e12) == pytest.approx(flops / (2.5 * 1e12))
    page, _ = write_report(study, found)
    text = page.read_text()
    assert "4 of 9 cells are done" in text and "Oversubscribed" in text and "busy machine" not in text
    rows = read_json(study.path / "scaling.json")["rows"]
    assert [(row["processes"], row["efficiency"]) for row in rows] == [(1, 1.0), (4, pytest.approx(0.8))]


def test_the_measured_device_is_one_of_the_planner(small: Path) -> None:
    """The description has the keys of a GPU's, ra3 plan takes it, and the prediction is what it says."""
    study = study_of(repeats=1, steps=1, mode="strong")
    found = made(study, {"as_configured": [1.0]})
    done = finished_cells(study.path, found)
    write_report(study, found)
    gpu = gpu_named(str(study.path / "device.yaml"))
    assert gpu.model_dump() == {**gpu.model_dump(), **described(done, None)}
    assert (gpu.fp32_tflops, gpu.nvlink_gb_s, gpu.context_gib, gpu.rates["launch_seconds"]) == (0.05, 1.5, 0.25, 2e-3)
    one, two = (planned(cell, gpu) for cell in done)
    model = done[0].config.model
    # fp32: 4 bytes of weights, 4 of gradients, 8 of moments
    assert one.memory.optimizer == pytest.approx(2 * one.memory.weights) and one.memory.gradients == one.memory.weights
    assert one.memory.buffers == 0.25 and one.memory.weights < 0.25 * GIB
    flops = 3 * 4 * 64 * (token_flops(model, 384, 64)["layers"] + token_flops(model, 384, 64)["output"])
    assert one.step.matmul == pytest.approx(flops / (0.05e12 * 0.8))
    assert two.step.data > 0 == one.step.data
    busy = made(study, {"as_configured": [1.0]}, busy_cores=1.5)
    assert "A busy machine" in write_report(study, busy)[0].read_text()


def test_no_mfu_of_another_peak_than_the_one_named(small: Path) -> None:
    """A data sheet that has no peak in fp32: what the processes reached in products does not take its place."""
    sheet = small.parent / "card.yaml"
    sheet.write_text("{memory_gib: 80, bf16_tflops: 900, memory_gb_s: 3000, nvlink_gb_s: 400, network_gb_s: 50}")
    study = study_of(repeats=1, steps=1, processes="1", mode="strong", gpu=str(sheet))
    found = made(study, {"as_configured-single": [2.0]})
    _, (table,) = write_report(study, found)
    (row,) = table.rows
    assert row[table.header.index("MFU")] == ABSENT and row[table.header.index("predicted s")] == ABSENT
    kept = read_json(study.path / "scaling.json")
    assert kept["rows"][0]["mfu"] == [None]
    text = (study.path / "table.md").read_text()
    assert "No prediction: precision fp32: the description of card has no fp32_tflops." in text and "MFU =" not in text


def test_other_settings_are_refused(small: Path) -> None:
    """The layout's keys and the rows count here, as they decide the time."""
    made(study_of(repeats=1), {"as_configured-dp2-b4": [1.0] * 12})
    start = ("study", "scaling", small, "--folder", "out", "--processes", "1,2", "--repeats", "1")
    plan = ra3(*start, "--dry-run").stdout
    assert len(re.findall(r"\bdone\b", plan)) == 1 and len(re.findall(r"\bto run\b", plan)) == 2
    for change, line in (
        (("--steps", "5"), "warm_start.steps=15, and the study asks for 8"),
        (("--rows", "corpus"), "rows=full, and the study asks for corpus"),
        (("parallel.overlap_grad_reduce=true",), "parallel.overlap_grad_reduce=False, and the study asks for True"),
    ):
        assert line in ra3(*start, *change, "--dry-run", code=2).stderr


def test_arrays_by_nodes(small: Path) -> None:
    study = study_of(processes="1,2,4,8", processes_per_node=2, layouts="data,micro_batch=1", mode="strong", batch=8)
    study = study.model_copy(update={"sbatch": ["--partition=gpu"], "repeats": 1})
    found = measured(study)
    groups = jobs.groups(study, found.cells, found.configs, done=[found.cells[1].name])
    assert [(g.nodes, g.each, g.cells) for g in groups] == [(1, 1, [0]), (2, 2, [2]), (4, 2, [3])]
    words = jobs.command_of(Path("s"), groups[1], 3, study.sbatch)
    assert " ".join(words) == (
        "sbatch --parsable --array=2 --nodes=2 --ntasks-per-node=2 --cpus-per-task=3 --partition=gpu s"
    )
    script = jobs.render_script(study, Path("a b/scaling.yaml"), Path("out"))
    assert "#SBATCH --exclusive\n" in script
    assert script.endswith("exec ra3 study scaling 'a b/scaling.yaml' --cell \"$SLURM_ARRAY_TASK_ID\"\n")


@pytest.mark.extended
@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_real_study_on_one_and_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells are measured; the second call touches nothing that is done; a cell that fails loses no other."""
    monkeypatch.chdir(tmp_path)
    source = write_corpus(tmp_path / "code")
    Path("small.yaml").write_text(CONFIG.replace("CORPUS", str(source)))
    options = (
        "--processes",
        "1,2",
        "--mode",
        "strong",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--repeats",
        "1",
        "--estep",
        "1",
    )
    start = ("study", "scaling", "small.yaml", "--folder", "out", *options)
    said = ra3(*start).stdout
    assert "as_configured-dp2-b4,seed=1: " in said and "Strong scaling" in said
    cells = Path("out/cells")
    one, two = (read_json(cells / f"as_configured-{tag}-b4,seed=1" / "summary.json") for tag in ("single", "dp2"))
    assert [len(x["steps"]) for x in (one, two)] == [3, 3] and [len(x["probes"]) for x in (one, two)] == [1, 2]
    for step in one["steps"] + two["steps"]:
        assert step["tokens"] == 4 * 160 and step["fill_rate"] == 1.0 and step["seconds"] > 0
    # the same rows and weights: the layout does not change the losses
    assert [s["loss"] for s in two["steps"]] == pytest.approx([s["loss"] for s in one["steps"]], rel=1e-4)
    assert one["layer_start_seconds"] > 0 and len(one["estep"]["updates"]) == 1
    assert all(0 < each["before_gib"] <= each["peak_gib"] < 8 for each in two["memory"])
    assert two["probes"][0]["links"]["node"]["all_reduce_gb_s"] > 0
    for name in ("report.html", "scaling.json", "table.md", "device.yaml", "figures/strong-as_configured.png"):
        assert Path("out", name).is_file(), name
    rows = read_json(Path("out/scaling.json"))["rows"]
    expected = one["steps"][1:], two["steps"][1:]
    seconds = [sum(s["seconds"] for s in steps) / 2 for steps in expected]
    assert [row["step_seconds"]["median"] for row in rows] == pytest.approx(seconds)
    assert rows[1]["efficiency"] == pytest.approx(seconds[0] / seconds[1] / 2)
    assert all(row["predicted"]["step_seconds"] > 0 for row in rows)
    assert len([json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]) == 2

    files = {path: path.stat().st_mtime_ns for path in cells.rglob("summary.json")}
    assert "2 of 2 cells are done already" in ra3(*start).stdout
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("summary.json")} == files
    Path("out/report.html").unlink()
    assert ra3("study", "report", "out").stdout.strip() == "out/report.html" and Path("out/report.html").is_file()

    # a cell that cannot run is reported, and the others stay
    lost = cells / "as_configured-dp2-b4,seed=1" / "summary.json"
    lost.unlink()
    monkeypatch.setattr("ra3_megatron.verbs.scaling_cell.MODULE", "ra3_megatron.verbs.no_such_module")
    assert "failed: exit code 1" in ra3(*start, code=1).stdout
    assert "1 of 2 cells are done" in Path("out/report.html").read_text()


def test_parts_are_shown_where_the_trainer_tells_them(small: Path) -> None:
    study = study_of(repeats=1, steps=2, warmup=0, mode="strong")
    steps = [{"seconds": 1.0, "tokens": 256, "seconds_forward": 0.25 + n / 10, "seconds_backward": 0.5} for n in (0, 1)]
    found = made(study, {"as_configured": [1.0]}, steps=steps)
    assert finished_cells(study.path, found)[0].parts == pytest.approx({"forward": 0.3, "backward": 0.5})
    write_report(study, found)
    assert (study.path / "figures" / "parts.png").is_file()
    assert "| as_configured-dp2-b4 | forward | 0.3 | – |" in (study.path / "table.md").read_text()


def test_parts_are_drawn_at_the_median_of_the_repeats() -> None:
    """Of two, the mean."""
    cells = [SimpleNamespace(parts={"forward": seconds}) for seconds in (0.2, 0.4)]
    row: Any = SimpleNamespace(point=SimpleNamespace(arm="a"), cells=cells)
    (bar,) = _parts([row]).axes[0].patches
    assert isinstance(bar, Rectangle) and bar.get_width() == pytest.approx(0.3)
