"""Controls change the latents of infused documents and nothing else."""

from collections import Counter

import numpy as np
import pytest
from toy import FORMATS, LARGE, Toy

from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.em.controls import Control, control_latents
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import code_text, compose, raw
from ra3_megatron.text.transcript import Transcript

CODES = ["a = b\n  ab(c):\n   b\n\nc\n", "b\n", "  a\nb = d\nc\n", "a\nb\na\nb\n"] * 3
LONGEST = 64
HOWS: tuple[Control, ...] = ("shuffled", "filler", "moved")


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


class Sampled:
    """Transcripts of a policy that thinks at about half of the lines."""

    def __init__(self, toy: Toy, length: int = LONGEST, human: bool = False) -> None:
        model = toy.model(seed=14, lean=2.0)
        config = toy.config()
        config = config.model_copy(update={"model": config.model.model_copy(update={"context_length": length})})
        self.policy: LatentPolicy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer, 0)
        if human:
            documents = [
                toy.document(f"#ab\n{c}#a b\nd\n", f"d{i}", human_comments="as_thoughts") for i, c in enumerate(CODES)
            ]
            self.documents = [compose(d, d.observed, toy.latents, toy.tokenizer) for d in documents]
        else:
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


@pytest.mark.parametrize("how", HOWS)
def test_the_thoughts_of_a_human_stay(toy: Toy, how: Control) -> None:
    made = Sampled(toy, human=True)
    human = [[line for line in range(t.num_lines) if not t.offered[line]] for t in made.transcripts]
    assert all(len(lines) >= 2 for lines in human)
    before, after = thoughts(toy, made.transcripts), thoughts(toy, made.changed(how))
    assert before != after
    for lines, old, new in zip(human, before, after, strict=True):
        assert [new.get(line) for line in lines] == [old.get(line) for line in lines]


def test_no_thought_keeps_its_place_in_a_shuffle(toy: Toy) -> None:
    """Two thoughts change places, and of many of different contents none stays."""
    made = Sampled(toy)
    words = ["a", "b", "c", "d", "ab", "=", "(", ")", " = ", " b", "  ", "\t"]
    if toy.latents.name == "tokens":
        think, end = (toy.tokenizer.special[marker] for marker in ("<think>", "</think>"))
        spelled = [[think, *toy.tokenizer.encode(word), end] for word in words]
    else:
        spelled = [toy.tokenizer.encode(f"#{word}\n") for word in words]
    for count in (2, 3, 12):
        own = iter(spelled)
        given = []
        for code, key in zip(CODES[1::4] * 4, made.keys, strict=True):
            document = toy.document(code, str(key))
            observed = {0: tuple(next(own))} if len(given) < count else {}
            given.append(compose(document, observed, toy.latents, toy.tokenizer))
        shuffled = control_latents("shuffled", given, given, made.keys, made.policy, LONGEST)
        before, after = thoughts(toy, given), thoughts(toy, shuffled)
        assert all(b[0] != a[0] for b, a in zip(before, after, strict=True) if b)
        assert sorted(d[0] for d in before if d) == sorted(d[0] for d in after if d)


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


@pytest.mark.parametrize("how", ["shuffled", "filler"])
@pytest.mark.parametrize("human", [False, True])
def test_a_context_that_is_full_loses_its_last_thoughts(toy: Toy, how: Control, human: bool) -> None:
    made = Sampled(toy, human=human)
    longest = max(t.num_tokens for t in made.changed(how))
    tight = max(t.num_tokens for t in made.documents) + 2
    assert tight < longest
    changed, whole = made.changed(how, tight), made.changed(how)
    assert max(t.num_tokens for t in changed) <= tight
    for mine, sampled, full in zip(changed, made.transcripts, whole, strict=True):
        left = thoughts(toy, [mine])[0]
        everything = thoughts(toy, [full])[0]
        assert left.items() <= everything.items()
        lost = [line for line in everything if line not in left]
        assert bool(lost) == (full.num_tokens > tight)
        assert all(sampled.offered[line] for line in lost)
        if lost:
            first = min(lost)
            assert not [line for line in left if line > first and sampled.offered[line]], "the last ones go"
            length = int((full.lines == first).sum() - (mine.lines == first).sum())
            assert mine.num_tokens + length > tight, "no more goes than has to"


def test_thoughts_are_moved_within_the_context(toy: Toy) -> None:
    tight = 24
    made = Sampled(toy, tight)
    moved = made.changed("moved", tight)
    assert all(t.num_tokens <= tight for t in moved)
    assert sum(t.think.sum() for t in moved) <= sum(t.think.sum() for t in made.transcripts)
