"""A response ends with the token that completes a stop of its problem; nothing behind it is trained on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from toy import Toy

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.loop import Rlvr
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.problems.sources import Problems
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.sampling import Responder
from ra3_megatron.rlvr.sandbox import FunctionTests
from ra3_megatron.rollout.protocol import Finish
from ra3_megatron.rollout.sampling import LiveSampling

TESTS = FunctionTests("", ("assert x",), entry_points=("x",))


def test_responses_end_at_the_stops_of_their_problems(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", [b"a", b"b", b"\n", b"#", b"ba"], max_latent_tokens=1)
    config = toy.config(rlvr={"max_response_tokens": 90, "group_size": 4}, rollout={"temperature": 1.0})
    problems = [Problem("free", "a", TESTS), Problem("ends", "b", TESTS, stop=("b", "a\n"))]
    prompts = [[toy.tokenizer.bos, *toy.tokenizer.encode(each.prompt)] for each in problems]

    def responses(asked: list[Problem]) -> list[tuple[list[int], list[float], Finish]]:
        sampling = LiveSampling(toy.model(seed=3), runtime, toy.latents, toy.tokenizer, config.rollout, 128)
        cuts = Cuts(asked, toy.tokenizer, toy.latents)
        responder = Responder(sampling, prompts, cuts, config, toy.latents.ALL)
        found = responder.begin([0, 1, 1], (1, 2), 40)()
        assert all(each.prompt_tokens == 2 and not each.log_probs[:2].any() for each in found)
        return [(each.ids[2:].tolist(), each.log_probs[2:].tolist(), each.finish) for each in found]

    free = responses([Problem(each.name, each.prompt, TESTS) for each in problems])
    found = responses(problems)
    cuts = Cuts(problems, toy.tokenizer, toy.latents)
    stopped = 0
    for place, (before, now) in enumerate(zip(free, found, strict=True)):
        ended = cuts.ended(int(place >= 40), before[0])
        assert now[0] == before[0][:ended]
        np.testing.assert_allclose(now[1], before[1][:ended], atol=1e-5)
        assert now[2] is (before[2] if ended is None else Finish.END)
        assert (ended is None) or place >= 40
        stopped += ended is not None
        if ended is not None:
            assert cuts.ended(1, now[0][:-1]) is None, "the last token completes the stop"
            assert cuts.cut(1, now[0]).text == cuts.cut(1, before[0]).text
    assert stopped > 20


def test_responses_end_at_every_end_token(runtime: Runtime) -> None:
    """It is sampled and trained on as any token, and no text of the program, whatever it is called."""
    toy = Toy(runtime, "comment", [b"a", b"b", b"\n", b"#", b"ba"], max_latent_tokens=1)
    config = toy.config(rlvr={"max_response_tokens": 60, "group_size": 4}, rollout={"temperature": 1.0})
    problems = [Problem("free", "a", TESTS), Problem("fenced", "a", TESTS, "program", stop=("a\n",))]
    prompts = [[toy.tokenizer.bos, *toy.tokenizer.encode(each.prompt)] for each in problems]
    (end,) = toy.tokenizer.encode("ba")

    def responses(ends: frozenset[int]) -> tuple[list[Response], Cuts]:
        sampling = LiveSampling(toy.model(seed=3), runtime, toy.latents, toy.tokenizer, config.rollout, 128)
        cuts = Rlvr(run, None, asked, prompts, [], ends).cuts  # type: ignore[arg-type]
        return Responder(sampling, prompts, cuts, config, toy.latents.ALL).begin([0, 1], (1, 2), 30)(), cuts

    run = SimpleNamespace(tokenizer=toy.tokenizer, latents=toy.latents, config=config)
    asked = Problems(problems, [], None, {})
    plain, _ = responses(frozenset())
    found, cuts = responses(frozenset({end}))
    ended = 0
    for before, now in zip(plain, found, strict=True):
        ids = now.ids[2:].tolist()
        assert ids == before.ids[2 : 2 + len(ids)].tolist() and end not in ids[:-1]
        if ids[-1] == end:
            ended += 1
            assert now.finish is Finish.END and now.sampled[-1] and now.log_probs[-1] < 0
            assert cuts.cut(now.problem, ids).text == cuts.cut(now.problem, ids[:-1]).text
        else:
            assert ids == before.ids[2:].tolist() and now.finish is before.finish
    assert ended > 10
