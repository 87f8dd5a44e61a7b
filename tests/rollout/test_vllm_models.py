"""vLLM with the weights of every family: what Hugging Face computes, before and after updates that fail."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from vllm_processes import client_of, need_vllm, new_folder, save, wait_for_end
from weight_sources.file_weights import FileWeights

from ra3_megatron.rollout.vllm.messages import Answer, Draw, Drawn, EngineSpec, Events
from ra3_megatron.rollout.vllm.process import EngineClient, EngineError, EngineProcess
from ra3_megatron.rollout.vllm.segments import segments_of

VOCAB = 131
"""Not a multiple of 64, to which vLLM pads."""
LONGEST = 128

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
EXPERTS = {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": ROPE}),
    "qwen2": ("Qwen2", {"hidden_size": 128}),  # vLLM's has no head_dim
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("Mixtral", {"head_dim": 32, "num_local_experts": 4, "sliding_window": None, **EXPERTS}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
}
PROMPTS = ([3], [5, 9, 2, 77, 130], [(7 * n) % VOCAB for n in range(75)])


@dataclass
class Model:
    """A random Hugging Face model, and the vLLM process for it."""

    hf: Any
    folder: Path
    client: EngineClient

    def tensors(self) -> dict[str, Tensor]:
        """Weights as a checkpoint holds them, and the output weights in any case."""
        self.hf.save_pretrained(self.folder)
        tensors = load_file(self.folder / "model.safetensors")
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
        return tensors

    def update(self, tensors: dict[str, Tensor], version: int) -> None:
        self.client.call("update", version, FileWeights(save(tensors, "update")))

    def randomize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.hf.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)

    def greedy(self, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        with torch.no_grad():
            for _ in range(length):
                log_p = self.hf(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                ids.append(int(log_p.argmax()))
                values.append(float(log_p.max()))
        return ids[len(prompt) :], values

    def ask(self, *requests: Draw | Events, temperature: float = 1.0) -> Answer:
        answer: Answer = self.client.call("sample", requests, temperature)
        return answer

    def check(self) -> None:
        """The engine samples what Hugging Face computes."""
        answer = self.ask(*(draw(prompt, greedy=True) for prompt in PROMPTS))
        for prompt, drawn in zip(PROMPTS, answer.values, strict=True):
            ids, values = self.greedy(prompt, 12)
            assert isinstance(drawn, Drawn) and drawn.ids == ids and not drawn.ended
            np.testing.assert_allclose(drawn.log_probs, values, atol=1e-4)


def draw(prompt: list[int], seed: int = 0, greedy: bool = False) -> Draw:
    uniforms = np.random.default_rng([seed, *prompt]).random(12).tolist()
    return Draw(list(prompt), uniforms, first=(0, 0), later=(0, 0), greedy=greedy)


def start(name: str, **changes: Any) -> Model:
    need_vllm()
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": False, **settings})
    hf = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    folder = new_folder(name)
    hf.save_pretrained(folder)
    sets = np.zeros((3, VOCAB), dtype=bool)
    sets[0], sets[1, :7], sets[2, :50] = True, True, True
    spec = EngineSpec(str(folder), sets, LONGEST, kv_cache_gib=0.05, **changes)
    model = Model(hf, folder, client_of((name, *changes), lambda: spec))
    model.randomize(seed=1)
    return model


@pytest.fixture(scope="module")
def started() -> Iterator[Model]:
    yield start("llama-tied")


@pytest.fixture
def llama(started: Model) -> Model:
    """A model whose weights the engine holds as version 1."""
    started.randomize(seed=1)
    started.update(started.tensors(), 1)
    return started


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "qwen3-tied" else pytest.mark.extended)
        for name in MODELS
        if name not in ("llama-tied", "qwen3-moe")
    ],
)
def test_a_family_is_what_hugging_face_computes(name: str) -> None:
    model = start(name)
    check_family(model)
    assert model.client.process is not None
    model.client._connection.close()  # as when its owner dies, but not who started it
    wait_for_end(model.client.process.pid)


def check_family(model: Model) -> None:
    tensors = model.tensors()
    assert model.client.call("health").manifest == {key: tuple(value.shape) for key, value in tensors.items()}
    for version in (1, 2):
        model.randomize(seed=version)
        model.update(model.tensors(), version)
        model.check()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.extended
def test_two_tensor_parallel_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in trainers.items():  # which are none of the engine's business
        monkeypatch.setenv(name, value)
    model = start("qwen3-moe", tensor_parallel=2)
    check_family(model)
    broken = {name: value for name, value in model.tensors().items() if "layers.1.self_attn.k_proj" not in name}
    with pytest.raises(EngineError, match=r"k_proj.weight \[64, 64\] is missing"):
        model.update(broken, 2)
    model.update(model.tensors(), 3)
    model.check()
    process = model.client.process
    assert isinstance(process, EngineProcess)
    shared = segments_of(process.pid)
    assert shared and all(os.path.exists(path) for path, _ in shared)
    model.client.close()
    assert not [path for path, _ in shared if os.path.exists(path)]


def test_updates_are_followed_and_stamped(llama: Model) -> None:
    llama.check()
    assert llama.ask(draw([1])).version == 1
    before = llama.ask(*map(draw, PROMPTS))
    llama.randomize(seed=2)
    llama.update(llama.tensors(), 7)
    llama.check()  # the long prompt was cached with the old weights
    after = llama.ask(*map(draw, PROMPTS))
    assert after.version == 7 and after.values != before.values


def test_equal_seeds_give_equal_samples(llama: Model) -> None:
    once = llama.ask(*map(draw, PROMPTS)).values
    again = llama.ask(*map(draw, PROMPTS[::-1])).values[::-1]
    other = llama.ask(*(draw(prompt, seed=1) for prompt in PROMPTS)).values
    for one, two, three in zip(once, again, other, strict=True):
        assert isinstance(one, Drawn) and isinstance(two, Drawn) and isinstance(three, Drawn)
        assert one.ids == two.ids != three.ids
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)


def test_events_behind_cached_prefixes(llama: Model) -> None:
    """Many boundaries of one sequence cost few tokens, and are what a full pass says."""
    sequence = [(5 * n) % VOCAB for n in range(100)]
    places = list(range(4, 101, 4))
    answer = llama.ask(Events(sequence, places, [1] * len(places), 2), temperature=0.6)
    with torch.no_grad():
        logits = llama.hf(torch.tensor([sequence])).logits[0].double() / 0.6
    exact = logits[:, :7].logsumexp(-1) - logits[:, :50].logsumexp(-1)
    np.testing.assert_allclose(answer.values[0], exact[torch.tensor(places) - 1], atol=1e-5)
    assert answer.prompt_tokens == sum(places)
    assert answer.prompt_tokens - answer.cached_tokens < 32 * len(places)


def without(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


LAST = "model.norm.weight"
NAN = torch.full((64,), float("nan"))
ONE_INF = torch.cat([torch.ones(63), torch.tensor([-float("inf")])])
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": (
        {"model.layers.1.self_attn.k_proj.weight": None},
        r"model.layers.1.self_attn.k_proj.weight \[64, 64\] is missing",
    ),
    "tied output missing": ({"lm_head.weight": None}, r"lm_head.weight \[131, 64\] is missing"),
    "unknown": ({"model.extra.weight": torch.ones(3)}, r"model.extra.weight \[3\] is not part of the model"),
    "padded": (
        {"model.embed_tokens.weight": torch.zeros(192, 64)},
        r"model.embed_tokens.weight has shape \[192, 64\], not \[131, 64\]",
    ),
    "nan in the first tensor": ({"lm_head.weight": torch.full((VOCAB, 64), float("nan"))}, "lm_head.weight holds"),
    "nan amid a layer": (
        {"model.layers.0.self_attn.v_proj.weight": torch.full((64, 64), float("nan"))},
        "model.layers.0.self_attn.v_proj.weight holds",
    ),
    "nan in the last tensor": ({LAST: NAN}, f"{LAST} holds values that are not finite"),
    "one infinite value": ({LAST: ONE_INF}, f"{LAST} holds values that are not finite"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_failed_update_refuses_to_sample(llama: Model, kind: str) -> None:
    changes, message = BROKEN[kind]
    tensors = {**llama.tensors(), **changes}
    with pytest.raises(EngineError, match=message):
        llama.update({name: value for name, value in tensors.items() if value is not None}, 2)
    with pytest.raises(EngineError, match=rf"no usable weights \(the update to weight version 2 failed: .*{message}"):
        llama.ask(draw([1]))
    assert llama.client.call("health").version is None
    llama.update(llama.tensors(), 3)
    llama.check()


def test_a_truncated_file_fails_closed(llama: Model) -> None:
    path = Path(save(llama.tensors(), "truncated"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EngineError, match="update to weight version 2 failed: SafetensorError"):
        llama.client.call("update", 2, FileWeights(str(path)))
    with pytest.raises(EngineError, match="no usable weights"):
        llama.ask(draw([1]))
    llama.update(llama.tensors(), 3)
    llama.check()


def test_the_engine_outlives_what_it_refuses(llama: Model) -> None:
    with pytest.raises(EngineError, match="129 tokens is longer than 128"):
        llama.ask(draw([1] * 117))
    with pytest.raises(EngineError, match="an empty prompt"):
        llama.ask(Events([1, 2], [0], [0], 0))
    llama.check()
