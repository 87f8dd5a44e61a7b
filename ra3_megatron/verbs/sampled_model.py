"""A model opened for sampling in this process: a checkpoint of a run, a converted one, or a Hugging Face folder."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import read_json

if TYPE_CHECKING:
    from ra3_megatron.rollout.protocol import RolloutEngine
    from ra3_megatron.text.latents import LatentFormat
    from ra3_megatron.text.tokenizer import Tokenizer

CONVERTED = ".converted"
"""Folder below the output folder for the weights of a Hugging Face folder; gone at the end."""


@dataclass(frozen=True)
class Weights:
    """Which weights, and how they are to be read."""

    name: str
    """As the user named them."""
    checkpoint: Path | None
    """None: `hf` is converted first."""
    hf: Path | None
    """Small files of the Hugging Face folder that the model came from, or the folder itself."""
    config: RunConfig
    """Architecture, tokenizer, latent format, sampling."""
    tokenizer: "Tokenizer"
    latents: "LatentFormat"
    identity: str
    """SHA-256 of what decides the weights: the checksums of their files, and the tokenizer."""


def find_weights(
    checkpoint: Path | None, hf: Path | None, engine: str, temperature: float, overrides: Sequence[str]
) -> Weights:
    """Read all but the weights. Raises UserError when they are none, or do not fit the overrides."""
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.hf.importing import HF_FOLDER, model_of
    from ra3_megatron.hf.source import Source
    from ra3_megatron.text.latents import build_format
    from ra3_megatron.text.tokenizer import load_tokenizer
    from ra3_megatron.verbs.infuse import hf_source_of, run_of, weights_of

    if checkpoint is not None:
        weight_files = weights_of(checkpoint)
        run, kept = run_of(checkpoint), hf_source_of(checkpoint)
        if run is not None:
            config = load_config(run.config, overrides, resolved=True)
            tokenizer = load_tokenizer(config.tokenizer, run.path / "corpus" / "tokenizer", config.model.vocab_size)
        elif kept is not None:
            config = load_config(None, [f"model.hf={checkpoint / HF_FOLDER}", *overrides])
            tokenizer = load_tokenizer(config.tokenizer, checkpoint / HF_FOLDER, config.model.vocab_size)
        else:
            raise UserError(f"--checkpoint={checkpoint}: stands in no run folder and keeps no Hugging Face files")
        name = str(checkpoint)
    else:
        assert hf is not None
        if not hf.is_dir():
            raise UserError(f"--hf={hf}: no such folder")
        family, model, vocab_size = model_of(hf)
        source = Source.open(hf)
        source.check(family.links(model, vocab_size))
        config = load_config(None, [f"model.hf={hf}", *overrides])
        tokenizer = load_tokenizer(config.tokenizer, hf, config.model.vocab_size)
        weight_files = {path.name: _sha256(path) for path in source.files}
        name, kept = str(hf), hf
    rollout = config.rollout.model_copy(
        update={"engine": engine, "temperature": temperature or 1.0, "placement": "colocated", "replicas": 1}
    )
    config = config.model_copy(update={"rollout": rollout, "parallel": ParallelConfig(threads=config.parallel.threads)})
    latents = build_format(config.text, tokenizer)
    told = json.dumps([weight_files, tokenizer.fingerprint], sort_keys=True)
    identity = hashlib.sha256(told.encode()).hexdigest()
    return Weights(name, checkpoint, kept, config, tokenizer, latents, identity)


@contextmanager
def open_engine(weights: Weights, out: Path) -> Iterator["RolloutEngine"]:
    """The engine that samples with these weights, in this process or in a vLLM process beside it.

    Raises UserError when they cannot be loaded, Unavailable when vLLM fails.
    """
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.hf.importing import import_hf
    from ra3_megatron.mcore import checkpoint as checkpoints
    from ra3_megatron.mcore import startup
    from ra3_megatron.mcore.model import build_model
    from ra3_megatron.rollout.decode_graphs import require_cuda_graphs
    from ra3_megatron.rollout.engine_pool import EnginePool
    from ra3_megatron.rollout.megatron_engine import MegatronEngine
    from ra3_megatron.training.identity import check_fit

    config, tokenizer, latents = weights.config, weights.tokenizer, weights.latents
    runtime = startup.initialize(config.parallel, config.seed)
    folder, pool, done = weights.checkpoint, None, False
    try:
        if folder is None:
            assert weights.hf is not None
            folder = out / CONVERTED
            import_hf(weights.hf, folder, config.model.weight_type)
        check_fit(folder, "--checkpoint", config, tokenizer)
        model = build_model(config.model.frozen, config.parallel, runtime, tokenizer.vocab_size, latents.sets, None)
        checkpoints.load(folder, model, runtime)
        if config.rollout.engine == "megatron":
            require_cuda_graphs(config.rollout, runtime.device)
            size, graphs = tokenizer.vocab_size, config.rollout.cuda_graphs
            yield MegatronEngine(model, runtime, latents, size, config.rollout.temperature, cuda_graphs=graphs)
        else:
            pool = EnginePool(config, runtime, latents, tokenizer, out / "vllm", weights.hf)
            pool.sampling(model).publish(0)
            yield pool.engines[0]
        done = True
    finally:
        if pool is not None:
            pool.close(done)
        shutil.rmtree(out / CONVERTED, ignore_errors=True)
        startup.shutdown()


def end_ids(tokenizer: "Tokenizer", hf: Path | None) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those that `generation_config.json` of the Hugging Face folder
    names."""
    ends = {tokenizer.eos}
    file = None if hf is None else hf / "generation_config.json"
    if file is not None and file.is_file():
        named = read_json(file).get("eos_token_id")
        ends |= {int(token) for token in (named if isinstance(named, list) else [named]) if token is not None}
    return frozenset(ends)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
