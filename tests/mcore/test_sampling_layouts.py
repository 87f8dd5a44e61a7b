"""The key/value-cache sampler at tensor-parallel layouts: the transcripts of one process, and training undisturbed.

Sequence parallelism cannot split single tokens; it is off inside the sampler's passes and on again behind them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.model import build_model, language_model
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.transcript import Transcript
from tests.mcore.small_models import gradients, make_documents, make_trainer, micro_batches, put_in_rows
from tests.processes import run_processes
from tests.toy import LARGE, Toy

LINES = ("a = b\n", "  ab(c):\n", "   b\n\n", "c\n", " d(a)\n  \n", "ab=ab\n", "    b(a):\n")
SINGLE = ParallelConfig(threads=1)
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2, threads=1),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, threads=1),
}


def sample(parallel: ParallelConfig, runtime: Runtime) -> list[Transcript]:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=3)
    shape = toy.architecture.model_copy(update={"init_std": 0.6})
    model = build_model(shape, parallel, runtime, toy.tokenizer.vocab_size, toy.latents.sets, seed=4)
    engine = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size)
    generator = random.Random(1)
    documents = [toy.document("b\n" + "".join(generator.choices(LINES, k=1 + n)), f"document {n}") for n in range(7)]
    jobs = [Job(document, (3, d, g)) for d, document in enumerate(documents) for g in range(3)]
    return LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens=96, batch_size=9).sample(jobs)


def switches(model: torch.nn.Module) -> dict[str, Any]:
    """Every attribute of a module or its configuration that speaks of splitting sequences."""
    found = {}
    for name, module in model.named_modules():
        for owner, values in ((name, vars(module)), (f"{name}.config", vars(getattr(module, "config", module)))):
            found |= {(owner, key): value for key, value in values.items() if "sequence_parallel" in key}
            found |= {(owner, key): value for key, value in values.items() if key == "reduce_scatter_embeddings"}
    return found


def train_around_a_pass(parallel: ParallelConfig, runtime: Runtime, sampling: bool) -> dict[str, Any]:
    trainer = make_trainer(parallel, runtime)
    batches = micro_batches(put_in_rows(make_documents(12, seed=1)), runtime, 2)
    if sampling:
        model = language_model(trainer.model)
        before = switches(model)
        split = {key: value for key, value in before.items() if key[1] == "sequence_parallel"}
        assert len(split) > 10 and set(split.values()) == {parallel.sequence}
        with torch.no_grad():
            assert model(batches[0], hidden_only=True).shape[0] == batches[0].ids.shape[1]
        with pytest.raises(RuntimeError), torch.no_grad():  # positions of another length than the ids
            model(replace(batches[0], positions=batches[0].positions[:, :3]), hidden_only=True)
        assert switches(model) == before, "also after a pass that failed"
    return {"loss": trainer.step(batches, PolicyLoss()).loss, **gradients(trainer, runtime)}


def in_two_processes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        runtime = initialize(parallel, seed=1)
        found[name] = sample(parallel, runtime)
        disturbed, plain = (train_around_a_pass(parallel, runtime, sampling) for sampling in (True, False))
        assert disturbed["loss"] == plain.pop("loss")
        assert all(torch.equal(disturbed[key], value) for key, value in plain.items())
    return found


@pytest.mark.multiprocess
def test_layouts_sample_the_same_transcripts(runtime: Runtime) -> None:
    expected = sample(SINGLE, runtime)
    think = np.concatenate([t.think for t in expected])
    assert 0.05 < think.mean() < 0.95 and len(think) > 60
    ranks = run_processes(2, in_two_processes)
    for name in LAYOUTS:
        for found in ranks:
            assert len(found[name]) == len(expected)
            for one, other in zip(found[name], expected, strict=True):
                assert np.array_equal(one.ids, other.ids) and np.array_equal(one.think, other.think), name
                np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)
