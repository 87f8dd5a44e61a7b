"""The two modes of the same weights: `think` lets the model think, `no-think` masks tokens that could start a thought.

In the `comment` format a thought is a line that starts with "#". The mask of a request is the same at every position,
so `no-think` also keeps a model from a "#" that a token starts with inside a line. Where answers are no code (GSM8K's
end with a line "#### 18"), such a line is no thought: then there is one mode, `plain`, with nothing masked or dropped.
"""

from enum import StrEnum

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.suites import Suite


class Mode(StrEnum):
    """Whether the model may think."""

    THINK = "think"
    NO_THINK = "no-think"
    PLAIN = "plain"
    """There is no choice: see the module's docstring."""


NOTES = {
    Mode.THINK: "thoughts allowed and dropped before stop sequences",
    Mode.NO_THINK: "tokens that could start a thought are masked",
    Mode.PLAIN: 'comment lines are part of an answer here ("#### 18"): nothing masked, nothing dropped',
}


def modes_of(suite: Suite, asked: str, latent_format: str, option: str = "--mode") -> list[Mode]:
    """The modes to run for `asked`, the value of `option`. Raises UserError when the suite has no such mode."""
    if suite.answers_are_code or latent_format != "comment":
        return [Mode.THINK, Mode.NO_THINK] if asked == "both" else [Mode(asked)]
    if asked == "no-think":
        raise UserError(
            f"{option}=no-think: {suite.name} has answers with lines that start with '#', which are thoughts in "
            f"text.latent_format=comment: use {option} think, which leaves them alone there"
        )
    return [Mode.PLAIN]
