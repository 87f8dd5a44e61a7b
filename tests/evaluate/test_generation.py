"""Samples do not depend on the batch, on pieces or on interruptions; modes mask and drop what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from toy import LARGE, SMALL, Toy

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.evaluate.generation import Settings, Writer
from ra3_megatron.evaluate.modes import Mode, modes_of
from ra3_megatron.evaluate.samples import Sample
from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.rollout.megatron_engine import MegatronEngine

IDS = ["t0", "t1", "t2"]
PROMPTS = ["ab):\n", "b):\n  a\n", "a" * 70]
"""The last one is longer than the context."""


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return initialize(ParallelConfig(threads=1), seed=1)


def writer(
    toy: Toy, mode: Mode = Mode.THINK, lean: float = 0.0, stops: tuple[str, ...] = (), **changes: object
) -> Writer:
    latents = toy.latents
    temperature = float(changes.get("temperature", 1.0))  # type: ignore[arg-type]
    engine = MegatronEngine(toy.model(3, lean), toy.runtime, latents, toy.tokenizer.vocab_size, temperature or 1.0)
    given = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "seed": 5, "batch_size": 4}
    values = {**given, **changes}
    settings = Settings(**values, stop_ids=frozenset({toy.tokenizer.eos}), context_length=64)  # type: ignore[arg-type]
    suite = replace(SUITES["humaneval"], stops=stops)
    return Writer(engine, toy.tokenizer, latents, toy.text, suite, mode, settings)


def write(what: Writer, done: Sequence[Sample] = ()) -> list[Sample]:
    found = list(done)
    what.write(IDS, PROMPTS, done, found.extend)
    place = {name: number for number, name in enumerate(IDS)}
    return sorted(found, key=lambda sample: (place[sample.task_id], sample.number or 0))


@pytest.fixture(params=["comment", "tokens"])
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, 4)


def test_batches_and_interruptions_change_nothing(toy: Toy) -> None:
    wanted = write(writer(toy))
    assert len(wanted) == 9 and [s.number for s in wanted] == [0, 1, 2] * 3
    assert len({s.completion for s in wanted[:6]}) == 6, "samples have uniforms of their own"
    assert write(writer(toy, batch_size=1)) == wanted
    assert write(writer(toy), [wanted[4], wanted[0]]) == wanted
    assert write(writer(toy, seed=6)) != wanted
    fewer = write(writer(toy, samples=1))
    assert fewer == wanted[::3], "the first sample stays the first when more are asked for"


def test_pieces_change_nothing(toy: Toy) -> None:
    wanted = write(writer(toy, stops=("=",)))
    what = writer(toy, stops=("=",))
    for piece in (1, 5, 1000):
        what.engine.piece = piece
        assert write(what) == wanted
    found = wanted
    assert all("=" not in (sample.completion or "") for sample in found)
    assert any("=" in (sample.completion or "") for sample in write(writer(toy))), "the stop has stopped something"


def test_a_stop_ends_the_sampling(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sampled behind the piece in which a stop is seen."""

    def asked(stops: tuple[str, ...]) -> int:
        requests: list[int] = []
        what = writer(toy, stops=stops)
        what.engine.piece = 2
        engine = what.engine.generate
        monkeypatch.setattr(what.engine, "generate", lambda batch: requests.append(len(batch)) or engine(batch))
        write(what)
        return sum(requests)

    everything = tuple(letter for letter in "abcd\n (=)#x")
    assert asked(everything) < asked(()) / 2


def test_a_prompt_that_does_not_fit_gets_an_empty_sample(toy: Toy) -> None:
    what = writer(toy)
    assert what.too_long(PROMPTS) == [2]
    assert [(s.completion, s.tokens) for s in write(what)[6:]] == [("", 0)] * 3


def test_greedy_samples_are_the_most_probable(toy: Toy) -> None:
    first, second, *_ = write(writer(toy, temperature=0.0))
    assert first.completion == second.completion


def test_a_small_top_p_gives_the_most_probable_samples(toy: Toy) -> None:
    """Of the same random numbers; every token in between is among fewer than before."""
    greedy = write(writer(toy, temperature=0.0))
    assert write(writer(toy, temperature=1.0, top_p=1e-9)) == greedy
    assert greedy != write(writer(toy, top_p=0.5)) != write(writer(toy))


@pytest.mark.parametrize("name", ["comment", "tokens"])
def test_a_model_that_likes_to_think_does_and_does_not(name: str, runtime: Runtime) -> None:
    toy = Toy(runtime, name, SMALL, 4)
    think = write(writer(toy, Mode.THINK, lean=4.0))[:6]
    silent = write(writer(toy, Mode.NO_THINK, lean=4.0))[:6]
    assert sum(s.thought_tokens or 0 for s in think) > 10
    assert all(s.thought_tokens == 0 for s in silent) and all((s.tokens or 0) > 0 for s in silent)
    if name == "comment":
        assert "#" not in "".join(s.completion or "" for s in silent)


@pytest.mark.parametrize("table", [SMALL, LARGE])
def test_the_mask_holds_every_token_that_can_start_a_comment_line(table: list[bytes], runtime: Runtime) -> None:
    tokens = [*table, b"\n#", b"a\n  # b", b"a # b", b"a#"]
    toy = Toy(runtime, "comment", tokens, 4)
    allowed = toy.latents.sets[toy.latents.no_thought_set]
    for index, token in enumerate(toy.tokenizer.token_bytes):
        starts = any(line.strip().startswith(b"#") for line in token.split(b"\n"))
        assert allowed[index] == (not starts), token
    marked = Toy(runtime, "tokens", tokens, 4)
    allowed = marked.latents.sets[marked.latents.no_thought_set]
    assert np.flatnonzero(~allowed).tolist() == [marked.tokenizer.special["<think>"]]


def test_modes_of_suites() -> None:
    comment, tokens = "comment", "tokens"
    code, numbers = SUITES["humaneval"], SUITES["gsm8k"]
    assert modes_of(code, "both", comment) == modes_of(numbers, "both", tokens) == [Mode.THINK, Mode.NO_THINK]
    assert modes_of(numbers, "both", comment) == modes_of(numbers, "think", comment) == [Mode.PLAIN]
    assert modes_of(code, "no-think", comment) == [Mode.NO_THINK]
    with pytest.raises(UserError, match=r"^--mode=no-think: gsm8k has answers with lines that start with '#'"):
        modes_of(numbers, "no-think", comment)


def test_prompts_of_code_have_the_markers_of_the_format(runtime: Runtime) -> None:
    """A model of the `tokens` format has read code line by line, each behind a marker; a question is plain text."""
    toy = Toy(runtime, "tokens", LARGE, 4)
    what = writer(toy)
    plain = [toy.tokenizer.bos, *toy.tokenizer.encode("a = b\n  b = a\n")]
    for name, markers in (("humaneval", 2), ("gsm8k", 0)):
        what.suite = SUITES[name]
        ids = what._ids("a = b\n  b = a\n")
        assert ids.count(toy.tokenizer.special["<act>"]) == markers
        assert (ids == plain) == (markers == 0)
