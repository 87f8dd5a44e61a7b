"""Ragged incremental passes equal full passes, after any sequence of feeding, cutting and selecting."""

import random

import pytest
import torch
from toy import LARGE, Toy

from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout import kv_session
from ra3_megatron.rollout.kv_session import KVSession
from ra3_megatron.rollout.stage_pass import StagePass


@pytest.fixture(scope="module")
def model(runtime: Runtime) -> LanguageModel:
    return Toy(runtime, "comment", LARGE, 2).model(seed=1)


def hidden_of(model: LanguageModel, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    positions = torch.arange(len(row))[None]
    with torch.no_grad():
        return model.eval()(TokenBatch(ids, positions, torch.zeros_like(ids), ids), hidden_only=True)[:, 0]


def feed(session: KVSession, rows: list[list[int]], new: list[list[int]]) -> None:
    """Feed, and compare with a full pass over each row."""
    starts = [len(row) for row in rows]
    hidden, begins = session.feed(new)
    assert hidden.shape[0] == sum(len(tokens) for tokens in new)
    for number, tokens in enumerate(new):
        rows[number] = rows[number] + tokens
        if tokens:
            exact = hidden_of(session.stage.chunks[0], rows[number])[starts[number] :]
            torch.testing.assert_close(
                hidden[begins[number] : begins[number] + len(tokens)], exact, atol=2e-5, rtol=1e-5
            )
    assert session.lengths == [len(row) for row in rows]


def aligned_session(monkeypatch: pytest.MonkeyPatch, stage: StagePass, aligned: int) -> KVSession:
    """A session that, with all that are made of it, attends to slots in such a multiple."""
    plain = KVSession.__init__

    def begin(self: KVSession, stage: StagePass) -> None:
        plain(self, stage)
        self.aligned = aligned

    monkeypatch.setattr(KVSession, "__init__", begin)
    return KVSession(stage)


@pytest.mark.parametrize("aligned", [1, kv_session.ALIGNED])
@pytest.mark.parametrize("seed", range(4))
def test_any_history_equals_a_full_pass(
    model: LanguageModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, seed: int, aligned: int
) -> None:
    """aligned: as on a CPU, and as on a GPU."""
    generator = random.Random(seed)
    session = aligned_session(monkeypatch, StagePass(model, runtime), aligned)
    rows: list[list[int]] = [[] for _ in range(5)]
    session.open(5)
    feed(session, rows, [[generator.randrange(25) for _ in range(generator.randint(1, 40))] for _ in rows])
    for _ in range(12):
        action = generator.choice(["feed", "feed", "cut", "select"])
        if action == "cut":
            kept = [generator.randint(1, len(row)) for row in rows]
            session.cut(kept)
            rows = [row[:n] for row, n in zip(rows, kept, strict=True)]
        elif action == "select":
            chosen = [generator.randrange(len(rows)) for _ in range(generator.randint(1, 7))]
            session.select(chosen)
            rows = [rows[r] for r in chosen]
        else:
            new = [[generator.randrange(25) for _ in range(generator.choice([0, 1, 2, 30]))] for _ in rows]
            feed(session, rows, new if any(new) else [[3] for _ in rows])
    feed(session, rows, [[4, 5] for _ in rows])


@pytest.mark.parametrize("aligned", [1, kv_session.ALIGNED])
def test_rows_split_off_and_come_back(
    model: LanguageModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, aligned: int
) -> None:
    session = aligned_session(monkeypatch, StagePass(model, runtime), aligned)
    rows = [[1, 2, 3], [4], [5, 6] * 40, [7, 8]]
    session.open(4)
    feed(session, [[], [], [], []], rows)
    part = session.split([2, 0])
    split = [rows[2], rows[0]]
    feed(part, split, [[9, 9], [10]])
    session.select([1, 3])
    kept = [rows[1], rows[3]]
    feed(session, kept, [[11], []])
    session.append(part)
    together = kept + split
    feed(session, together, [[1], [2, 3], [], [4]])
    whole = session.split(range(4))
    whole.cut([1, 1, 1, 1])
    feed(whole, [row[:1] for row in together], [[12]] * 4)
    assert session.lengths == [3, 4, 82, 5], "what is done to a part is not done to the whole"
    feed(session, together, [[13]] * 4)
    empty = KVSession(StagePass(model, runtime))
    empty.open(0)
    empty.append(session)
    assert empty.lengths == session.lengths


@pytest.mark.parametrize("aligned", [1, kv_session.ALIGNED])
def test_rows_that_went_another_way_replace_what_they_were(
    model: LanguageModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, aligned: int
) -> None:
    """One grows beyond the caches of the whole, one gets shorter, one stays as it was cut."""
    session = aligned_session(monkeypatch, StagePass(model, runtime), aligned)
    rows = [[1, 2, 3], [4, 5, 6, 7], [8] * 60, [9, 10]]
    session.open(4)
    feed(session, [[], [], [], []], rows)
    part = session.split([2, 0, 3])
    same = [50, 1, 2]
    part.cut(same)
    others = [rows[2][:50], rows[0][:1], rows[3]]
    feed(part, others, [[11] * 30, [12], []])
    assert session.lengths == [3, 4, 60, 2]
    session.replace([2, 0, 3], part, same)
    assert session.lengths == [2, 4, 80, 2]
    feed(session, [others[1], rows[1], others[0], others[2]], [[13], [14, 15], [16] * 3, [17]])


def test_copies_of_a_row_go_their_own_ways(model: LanguageModel, runtime: Runtime) -> None:
    session = KVSession(StagePass(model, runtime))
    session.open(1)
    rows = [[1, 2, 3]]
    feed(session, [[]], rows)
    session.select([0, 0, 0])
    rows = [[1, 2, 3]] * 3
    feed(session, rows, [[4], [5, 6], [7]])
    feed(session, rows, [[8, 8], [], [9]])
    session.cut([3, 4, 2])
    feed(session, [[1, 2, 3], [1, 2, 3, 5], [1, 2]], [[6], [7], [8]])


def test_a_row_cannot_be_cut_longer(model: LanguageModel, runtime: Runtime) -> None:
    session = KVSession(StagePass(model, runtime))
    session.open(2)
    session.feed([[1, 2], [3]])
    with pytest.raises(ValueError, match="cannot be cut"):
        session.cut([2, 2])


def test_the_model_is_left_as_it_was(model: LanguageModel, runtime: Runtime) -> None:
    """Training mode and attention without caches come back, also when a pass fails."""
    session = KVSession(StagePass(model, runtime))
    session.open(1)
    model.train()
    session.feed([[1, 2, 3]])
    assert model.training
    with pytest.raises(IndexError):
        session.feed([[10_000]])
    assert model.training
    before = hidden_of(model, [1, 2, 3, 4])
    torch.testing.assert_close(hidden_of(model, [1, 2, 3, 4]), before)
    assert before.shape[0] == 4
