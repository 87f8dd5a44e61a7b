"""E-step, refit, whole run and curves of the planner."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.scaling.curves import sizes
from ra3_megatron.scaling.em import (
    Thinking,
    engine_gpus,
    estep_time,
    refit_seconds,
    run_cost,
    sampling_seconds,
)
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.search import Planned, evaluate
from ra3_megatron.scaling.step import forward_seconds
from ra3_megatron.scaling.tables import Architecture, architecture_named, gpu_named
from ra3_megatron.verbs.plan import parse_layout

GPU = gpu_named("h100")
THINKING = Thinking(think_rate=0.4)


def planned(layout: str = "tensor=2,micro_batch=2") -> tuple[Architecture, Planned]:
    made = architecture_named("llama3.1-8b", 8192)
    parallel, micro_batch = parse_layout(layout, made.model, 16)
    return made, evaluate(made, parallel, Work(8192, 128, micro_batch), GPU)


def test_transcripts_hold_the_experts_tokens_and_thoughts() -> None:
    assert THINKING.document_tokens == pytest.approx(1e9 / 3.5e6, rel=0.01), "the paper's snippets"
    assert THINKING.transcript_tokens == pytest.approx(26 * (11 + 0.4 * 6))


def test_an_update_costs_more_with_more_of_anything() -> None:
    made, plan = planned()
    base = estep_time(made, plan, THINKING, GPU)
    assert base.total == pytest.approx(base.sampling + base.scoring + base.training + base.refit)
    for changes in ({"think_rate": 0.8}, {"thought_tokens": 12}, {"group": 16}, {"documents": 256}, {"lines": 52}):
        assert estep_time(made, plan, replace(THINKING, **changes), GPU).total > base.total, changes
    silent = estep_time(made, plan, replace(THINKING, think_rate=0.0), GPU)
    assert silent.sampling < 0.2 * base.sampling, "one pass a document decides all lines"


def test_documents_without_a_thought_are_not_read_again() -> None:
    """Sampling costs what it does without thinking when hardly any document has a thought, and rises from there."""
    made, _ = planned()
    rates = (0.0, 1e-6, 0.01, 0.05, 0.4, 0.8)
    seconds = [sampling_seconds(made, replace(THINKING, think_rate=rate), 16, 1024, GPU) for rate in rates]
    assert seconds == sorted(seconds) and seconds[1] == pytest.approx(seconds[0], rel=1e-3)
    one_in_four = 1 / (26 * 4)
    found = sampling_seconds(made, replace(THINKING, think_rate=one_in_four), 16, 1024, GPU)
    assert found < seconds[0] + 0.5 * (seconds[4] - seconds[0]), "three of four documents are read once"


def test_scoring_is_a_third_of_training() -> None:
    made, plan = planned()
    tokens = plan.work.global_batch * plan.work.sequence / plan.parallel.data
    forward = forward_seconds(made.model, made.vocab_size, plan.parallel, plan.work, GPU, tokens)
    assert forward == pytest.approx(plan.step.total / 3, rel=0.1)


def test_engines_are_as_small_as_their_weights_allow() -> None:
    sizes_of = {name: engine_gpus(architecture_named(name), GPU) for name in ("llama3.1-8b", "llama3.1-70b")}
    assert sizes_of == {"llama3.1-8b": 1, "llama3.1-70b": 8}


def test_twice_the_gpus_sample_in_half_the_time() -> None:
    made, _ = planned()
    slow, fast = (sampling_seconds(made, THINKING, gpus, 16 * 256 * 4, GPU) for gpus in (16, 32))
    assert slow == pytest.approx(2 * fast)


def test_refit_is_near_the_two_published_figures() -> None:
    """15 GB in 5.5 to 6 s, 61 GB in 7 s: within a third, which is what a constant and a rate can do."""
    assert refit_seconds(architecture_named("llama2-7b")) == pytest.approx(5.75, rel=0.34)
    assert refit_seconds(architecture_named("qwen3-30b-a3b")) == pytest.approx(7.0, rel=0.1)


def test_a_run_is_its_parts() -> None:
    made, plan = planned()
    cost = run_cost(made, plan, THINKING, GPU, 1e9, 2, 100)
    assert cost.total == pytest.approx(cost.esteps + cost.infusion + cost.msteps)
    assert cost.esteps == pytest.approx(200 * estep_time(made, plan, THINKING, GPU).total * 16 / 3600)
    with_thoughts = 1e9 * THINKING.transcript_tokens / THINKING.document_tokens
    assert cost.msteps == pytest.approx(with_thoughts / plan.tokens_per_second_per_gpu / 3600)


def test_infusion_samples_one_transcript_of_a_document() -> None:
    """Nobody shares its first pass, however many an E-step samples."""
    made, plan = planned()
    alone = sampling_seconds(made, replace(THINKING, group=1), 16, 1e9 / THINKING.document_tokens, GPU) * 16 / 3600
    for group in (2, 8):
        cost = run_cost(made, plan, replace(THINKING, group=group), GPU, 1e9, 2, 100)
        assert cost.infusion == pytest.approx(alone)


def test_json_and_table_hold_the_estep() -> None:
    arguments = ["plan", "--model", "llama3.1-8b", "--gpus", "16", "--think-rate", "0.4"]
    table = CliRunner().invoke(app, [*arguments, "--top", "1"])
    assert table.exit_code == 0 and "E-step update of 128 documents x 8" in table.output
    result = CliRunner().invoke(app, [*arguments, "--layout", "tensor=2,micro_batch=2", "--json"])
    found = json.loads(result.output)
    assert found["estep"]["seconds"] == pytest.approx(sum(found["estep"]["parts"].values()))
    assert found["run_gpu_hours"]["total"] > 0 and found["memory_gib"]["total"] > 0


def test_curves_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra3_megatron.scaling.curves.MOST_GPUS", 32)
    monkeypatch.setattr("ra3_megatron.scaling.curves.sizes", lambda gpus: sizes(gpus, 32))
    folder = tmp_path / "curves"
    arguments = ["--model", "llama3.2-1b", "--gpus", "8", "--global-batch", "64", "--top", "1", "--curves", str(folder)]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    page = (folder / "plan.html").read_text()
    assert "strong scaling" in page and "weak scaling" in page and "data:image/png" in page
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_curves_cover_thousands_of_gpus() -> None:
    assert sizes(24) == [3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 6144]
    assert sizes(8)[-1] == 8192
