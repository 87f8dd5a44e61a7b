"""Responses as people read them, from a batch that was graded."""

from collections.abc import Sequence

from ra3_megatron.report.responses import ResponseRecord
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.rewards import Graded
from ra3_megatron.text.tokenizer import Tokenizer

SHOWN = 24
"""Responses of a batch that are kept."""


def records_of(
    problems: Sequence[Problem],
    responses: Sequence[Response],
    graded: Graded,
    step: int,
    tokenizer: Tokenizer,
    every: int = 1,
) -> list[ResponseRecord]:
    """The first `SHOWN` of every `every`th response. step: updates behind which they were sampled."""
    found = zip(responses, graded.rewards, graded.outcomes, strict=True)
    return [
        ResponseRecord(
            problem=problems[response.problem].name,
            step=step,
            prompt=problems[response.problem].prompt,
            text=response.text(tokenizer),
            reward=reward,
            verdict=outcome.verdict.value,
            passed=outcome.passed,
            total=outcome.total,
            detail=outcome.detail,
            code_prompt=problems[response.problem].answer == "continues",
        )
        for response, reward, outcome in list(found)[::every][:SHOWN]
    ]
