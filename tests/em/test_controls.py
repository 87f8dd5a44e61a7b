"""Controls change the latents of infused documents and nothing else."""

from collections import Counter

import numpy as np
import pytest
from toy import FORMATS, LARGE, Toy

from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.em.controls import Control, control_latents
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import code_text, raw
from ra3_megatron.text.transcript import Transcript

CODES = ["a = b\n  ab(c):\n   b\n\nc\n", "b\n", "  a\nb = d\nc\n", "a\nb\na\nb\n"] * 3
LONGEST = 64
HOWS: tuple[Control, ...] = ("shuffled", "filler", "moved")


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


class Sampled:
    """Transcripts of a policy that thinks at about half of the lines."""

    def __init__(self, toy: Toy, length: int = LONGEST) -> None:
        model = toy.model(seed=14, lean=2.0)
        config = toy.config()
        config = config.model_copy(update={"model": config.model.model_copy(update={"context_length": length})})
        self.policy: LatentPolicy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer, 0)
        self.documents = [raw(toy.document(c, f"d{i}"), toy.latents, toy.tokenizer) for i, c in enumerate(CODES)]
        self.keys = [(5, d) for d in range(len(CODES))]
        self.transcripts = self.policy.sample(self.documents, self.keys, 1)

    def changed(self, how: Control, length: int = LONGEST) -> list[Transcript]:
        return control_latents(how, self.transcripts, self.documents, self.keys, self.policy, length, filler="d")


@pytest.fixture(scope="module")
def sampled(toy: Toy) -> Sampled:
    made = Sampled(toy)
    think = np.concatenate([t.think for t in made.transcripts])
    assert 0.2 < think.mean() < 0.9
    return made


@pytest.mark.parametrize("how", HOWS)
def test_the_experts_tokens_and_the_number_of_thoughts_stay(toy: Toy, sampled: Sampled, how: Control) -> None:
    for before, after, code in zip(sampled.transcripts, sampled.changed(how), CODES, strict=True):
        assert code_text(after, toy.tokenizer) == code
        assert after.document == before.document and after.weight_version == before.weight_version
        assert after.think.sum() == before.think.sum()
    again = sampled.changed(how)
    assert all(a == b for a, b in zip(sampled.changed(how), again, strict=True)), "the keys decide"


def thoughts(toy: Toy, transcripts: list[Transcript]) -> list[dict[int, tuple[int, ...]]]:
    return [to_document(t, toy.latents, toy.tokenizer).observed for t in transcripts]


def test_shuffled_thoughts_are_the_same_ones_elsewhere(toy: Toy, sampled: Sampled) -> None:
    before, after = thoughts(toy, sampled.transcripts), thoughts(toy, sampled.changed("shuffled"))
    assert [sorted(d) for d in after] == [sorted(d) for d in before], "the same lines"
    assert Counter(t for d in after for t in d.values()) == Counter(t for d in before for t in d.values())
    kept = [a[line] == b[line] for a, b in zip(after, before, strict=True) for line in a]
    assert np.mean(kept) < 0.6, "equal ones may change places"


def test_filler_says_nothing_at_the_same_length(toy: Toy, sampled: Sampled) -> None:
    before, after = thoughts(toy, sampled.transcripts), thoughts(toy, sampled.changed("filler"))
    for old, new in zip(before, after, strict=True):
        assert sorted(old) == sorted(new)
        for line, ids in old.items():
            assert len(new[line]) == len(ids) and new[line][0] == ids[0]
            assert toy.latents.ends_thought(new[line][-1]) == toy.latents.ends_thought(ids[-1])
    inner = {i for d in after for ids in d.values() for i in ids[1:] if not toy.latents.ends_thought(i)}
    assert len(inner) == 1, "one and the same token everywhere"


def test_moved_thoughts_are_written_by_q_at_random_lines(toy: Toy, sampled: Sampled) -> None:
    after = sampled.changed("moved")
    places = [(b.think != a.think).any() for a, b in zip(after, sampled.transcripts, strict=True)]
    assert np.mean(places) > 0.2
    assert all((a.think <= a.offered).all() for a in after)
    for transcript, key, document in zip(after, sampled.keys, sampled.documents, strict=True):
        (same,) = sampled.policy.sample([document], [key], 1, decisions=[transcript.think])
        assert same == transcript


def test_decisions_hold_where_q_would_never_think(toy: Toy) -> None:
    policy = latent_policy(
        toy.model(seed=6, lean=-60.0), toy.config(), toy.runtime, toy.latents, toy.tokenizer, weight_version=0
    )
    document = raw(toy.document("a = b\n  ab(c):\nd\n"), toy.latents, toy.tokenizer)
    (transcript,) = policy.sample([document], [(1,)], 1, decisions=[np.array([True, False, True])])
    assert transcript.think.tolist() == [True, False, True] and transcript.offered.all()


def test_a_context_that_is_full_loses_its_last_thoughts(toy: Toy) -> None:
    tight = 24
    made = Sampled(toy, tight)
    for how in HOWS:
        changed = made.changed(how, tight)
        assert all(t.num_tokens <= tight for t in changed)
        assert sum(t.think.sum() for t in changed) <= sum(t.think.sum() for t in made.transcripts)
