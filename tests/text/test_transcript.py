"""The transcript type on a hand-written example: two lines, the second with a thought."""

from dataclasses import replace

import numpy as np
import pytest

from ra3_megatron.text.transcript import Role, Transcript

C, E, L, D, T, F = Role.CONTEXT, Role.EXPERT, Role.LAYOUT, Role.DECISION, Role.THOUGHT, Role.FORCED


def made(roles: list[Role], lines: list[int]) -> Transcript:
    return Transcript(
        ids=np.arange(len(roles), dtype=np.int32),
        roles=np.array(roles, dtype=np.uint8),
        lines=np.array(lines, dtype=np.int32),
        offered=np.ones(max(lines) + 1, dtype=bool),
    )


@pytest.fixture
def comment() -> Transcript:
    return made([C, L, E, E, L, L, T, T, F, E, L, L], [-1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def tokens() -> Transcript:
    return made([C, D, L, E, L, D, T, T, L, E, L], [-1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])


def test_comment_positions(comment: Transcript) -> None:
    assert comment.decision_positions.tolist() == [2, 6]
    assert comment.first_expert.tolist() == [2, 9]
    assert comment.think.tolist() == [False, True]
    assert comment.thought_slice(0) == slice(0, 0)
    assert comment.thought_slice(1) == slice(6, 8)
    assert comment.ids[comment.is_code].tolist() == [1, 2, 3, 4, 5, 9, 10, 11]
    assert (comment.num_tokens, comment.num_lines) == (12, 2)


def test_tokens_positions(tokens: Transcript) -> None:
    assert tokens.decision_positions.tolist() == [1, 5]
    assert tokens.first_expert.tolist() == [3, 9]
    assert tokens.think.tolist() == [False, True]
    assert tokens.thought_slice(1) == slice(6, 8)


def test_equality_is_of_content(comment: Transcript) -> None:
    sampled = replace(comment, log_probs=np.zeros(12, dtype=np.float32))
    assert sampled == comment
    assert sampled.without_log_probs().log_probs is None
    assert replace(comment, ids=comment.ids + 1) != comment
    assert replace(comment, offered=~comment.offered) != comment
    assert comment != "text"
