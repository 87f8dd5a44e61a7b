"""Rollouts of rollout.engine=megatron: jump-ahead against one request per line, and plain decoding.

All samplers draw from the same uniforms and sample the same transcripts (`benchmarks/rollout.py`); the thinking rate is
forced, so that it does not depend on random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import rollout
from benchmarks.measure import alternate
from benchmarks.rollout import Workload
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.rollout.cuda_recorder import Recorder
from ra3_megatron.rollout.decode_graphs import DecodeGraphs
from ra3_megatron.rollout.kv_session import KVSession
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import GenerateRequest
from ra3_megatron.rollout.stage_pass import StagePass
from tests.gpu.evidence import Evidence, largest
from tests.gpu.setting import NEEDS_GPU, Setting, relative, release, with_precision

DOCUMENTS, BATCH = 32, 128
"""`rollout.GROUP` transcripts of each; at once."""
RATES = (0.1, 0.3)
"""Share of lines with a thought."""
MODELS = {
    "28M": ModelConfig(num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4),
    "1B-shaped": ModelConfig(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8
    ),
}
Part = Callable[[Evidence, Setting, str, Workload, torch.nn.Module], None]
PASSES = 6
"""That are compared: the first one is recorded."""
AGREE = 3e-2
"""Relative difference in bf16: rows and slots are padded, so sums have another order, other kernels may be chosen."""
DIRECT = 5e-2
"""The same between passes by Transformer Engine's modules and without them: each norm and product rounds to bf16 in a
kernel of another library. Orders of summation alone make 0.8e-2 in 8 layers of 512 channels, 2.1e-2 in 16 of 2,048."""
SAME = 0.8
"""Share of tokens sampled as without graphs, up to the first other one of a row: about once in a hundred choices a
uniform lies so near to the border of two tokens that rounding decides. Choices behind another row, from another set or
by another uniform agree hardly ever."""
NOISE = 0.3
"""Standard deviation of what is added to weights of norms and to biases: as drawn, they change nothing."""
TOKENS, ROWS = 64, (1, 32, 256)
"""Tokens that are decoded behind each prompt; prompts at once."""


def run(evidence: Evidence, setting: Setting) -> None:
    """Every model; passes of one with biases and more norms as well."""
    work = toy(setting) if setting.small else rollout.load("28M", setting.folder, DOCUMENTS)
    shapes = {"toy": work.config} if setting.small else MODELS
    for name, shape in shapes.items():
        if evidence.enough(name, setting.pick(60.0, 1.0)):
            measure(evidence, setting, name, work, shape, (direct, agree, choices, decode, sample))
    name, shape = next(iter(shapes.items()))
    if evidence.enough(name := f"{name} with biases and q/k norms", setting.pick(15.0, 1.0)):
        more = ModelConfig(**(shape.model_dump() | {"qkv_bias": True, "qk_norm": True}))
        measure(evidence, setting, name, work, more, (direct, agree))


def measure(
    evidence: Evidence, setting: Setting, name: str, work: Workload, shape: ModelConfig, parts: Sequence[Part]
) -> None:
    """Parts, of one model."""
    with evidence.attempt(name):
        mine = replace(work, config=with_precision(shape, "bf16" if setting.cuda else "fp32"))
        model = mine.model(setting.runtime)  # once: drawing a billion weights on the host takes half a minute
        disturb(model)
        for part in parts:
            with evidence.attempt(f"{name}: {part.__name__}"):
                part(evidence, setting, name, mine, model)
        del model
    release()


def disturb(model: torch.nn.Module) -> None:
    """Weights of norms and biases that a pass without them would not get right."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(noise.to(parameter.device, parameter.dtype), alpha=NOISE)


def sample(evidence: Evidence, setting: Setting, name: str, work: Workload, model: torch.nn.Module) -> None:
    """Documents a second of each sampler, `rollout.GROUP` transcripts each."""
    seconds = setting.pick(40.0, 1.0)
    for rate in setting.pick(RATES, RATES[1:]):
        repeats = setting.pick(3, 1)
        if not evidence.enough(f"{name}, thoughts on {rate:.0%} of lines", seconds):
            continue
        begin = time.monotonic()
        result = rollout.measure(work, setting.runtime, repeats, (rate,), setting.cuda, BATCH, model)[0]
        for sampler, timing in result.timings.items():
            text = f"{name}, thoughts on {rate:.0%} of lines, {sampler}"
            evidence.rate(text, timing, result.documents, "documents/s")
        for suffix in ("", ", graphs") if setting.cuda else ("",):
            fast, slow = result.timings[f"jump-ahead{suffix}"], result.timings[f"naive{suffix}"]
            text = f"{name}, thoughts on {rate:.0%} of lines{suffix}: jump-ahead, of one request per line"
            evidence.figure(text, slow.median / fast.median)
        seconds = time.monotonic() - begin  # the next rate takes as long or longer


def direct(evidence: Evidence, setting: Setting, name: str, work: Workload, model: torch.nn.Module) -> None:
    """Passes that leave Megatron-Core's modules out compute what the modules do, and what that saves."""
    prompts = [[work.tokenizer.bos, *document.lines[0].body] for document in work.documents]
    found, sides = {}, {}
    for label, straight in (("by its modules", False), ("without them", True)):
        stage = StagePass(model, setting.runtime, direct=straight)
        if straight:
            evidence.check(f"{name}: passes leave the modules out", float(stage.direct), at_least=1.0)
        session = KVSession(stage)
        session.open(len(prompts))
        found[label] = session.feed(prompts)[0]
        sides[label] = partial(_one_more, session)
    worst = relative(found["without them"], found["by its modules"])
    text = f"{name}: a pass without Megatron-Core's modules, off one by them"
    evidence.check(text, worst, DIRECT, unit="relative difference")
    for label, timing in alternate(sides, 5, wait=setting.wait).items():
        evidence.figure(f"{name}: a pass of a token a row, {label}", 1e3 * timing.median, "ms")


def _one_more(session: KVSession) -> None:
    """Feed a token to each row, and take it back."""
    lengths = list(session.lengths)
    session.feed([[7]] * session.rows)
    session.cut(lengths)


def agree(evidence: Evidence, setting: Setting, name: str, work: Workload, model: torch.nn.Module) -> None:
    """Passes that are graphs compute what passes that are none do: hidden states of the same tokens."""
    stage = StagePass(model, setting.runtime)
    graphs = DecodeGraphs(stage, record=recorder(evidence, setting, f"{name}: passes that are graphs"))
    prompts = [[work.tokenizer.bos, *document.lines[0].body] for document in work.documents]
    off = []
    for rows in (2, len(prompts)):  # the buffers grow, and all graphs are dropped
        session = KVSession(stage)
        session.open(rows)
        session.feed(prompts[:rows])
        plain = session.split(range(session.rows))
        decoding = graphs.decoding(session, PASSES)
        for token in range(PASSES):
            new = [[5 + token + row] for row in range(plain.rows)]
            off.append(relative(decoding.feed(new)[0], plain.feed(new)[0]))
    text = f"{name}: a pass that is a graph, off one that is none"
    evidence.check(text, largest(off), AGREE, unit="relative difference")


def recorder(evidence: Evidence, setting: Setting, name: str) -> Recorder | None:
    """CUDA's; on a CPU one that runs the function again into the same memory, for the code around it."""
    if setting.cuda:
        return None
    evidence.missing(name, NEEDS_GPU)
    return again


def again(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """As a `Recorder`."""
    out = function()

    def run_again() -> None:
        out.copy_(function())

    return out, run_again


def choices(evidence: Evidence, setting: Setting, name: str, work: Workload, model: torch.nn.Module) -> None:
    """Tokens chosen within graphs are those chosen behind plain passes: the same uniforms, two sets of tokens."""
    draw = np.random.default_rng(2)
    sets = (work.latents.universe, work.latents.thought_set)
    prompts = [[work.tokenizer.bos, *document.lines[0].body] for document in work.documents]
    requests = [
        GenerateRequest(prompt, draw.random(8 + n % 3), allowed=sets[n % 2]) for n, prompt in enumerate(prompts)
    ]
    plain, graphs = (MegatronEngine(model, setting.runtime, work.latents, work.tokenizer.vocab_size) for _ in range(2))
    graphs.graphs = DecodeGraphs(
        graphs.stage, graphs.choose, recorder(evidence, setting, f"{name}: choices within graphs")
    )
    same = total = 0
    for rows in (3, len(requests)):
        for one, other in zip(graphs.generate(requests[:rows]), plain.generate(requests[:rows]), strict=True):
            equal = [token == wanted for token, wanted in zip(one.ids, other.ids, strict=False)]
            same += [*equal, False].index(False)
            total += len(one.ids)
    evidence.check(f"{name}: tokens chosen within graphs as without", same / total, at_least=SAME, unit="share")


def decode(evidence: Evidence, setting: Setting, name: str, work: Workload, model: torch.nn.Module) -> None:
    """Tokens a second behind short prompts, one token of each row at a time."""
    draw = np.random.default_rng(1)
    tokens = setting.pick(TOKENS, 8)
    for graphs in (False, True) if setting.cuda else (False,):
        engine = MegatronEngine(model, setting.runtime, work.latents, work.tokenizer.vocab_size, cuda_graphs=graphs)
        for rows in setting.pick(ROWS, (2,)):
            prompts = [work.documents[n % len(work.documents)] for n in range(rows)]
            requests = [
                GenerateRequest([work.tokenizer.bos, *prompt.lines[0].body], draw.random(tokens)) for prompt in prompts
            ]
            repeat = partial(engine.generate, requests)
            timing = alternate({"": repeat}, 3, wait=setting.wait)[""]
            text = f"{name}: decoding{' by CUDA graphs' if graphs else ''}, {rows} rows"
            evidence.rate(text, timing, rows * tokens, "tokens/s")


def toy(setting: Setting) -> Workload:
    """A few documents of a few tokens, for the small form."""
    from tests.toy import LARGE, Toy

    made = Toy(setting.runtime, "comment", LARGE, max_latent_tokens=3)
    documents = [made.document(code, f"document {n}") for n, code in enumerate(("a = b\n ab(c):\n  b\n", "b\nab(a)\n"))]
    return Workload(made.architecture, made.tokenizer, made.latents, documents)
