"""What the latents of transcripts look like: how many, how long, how alike."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript


@dataclass(frozen=True)
class BlankTokens:
    """Tokens that say nothing in a thought."""

    invisible: frozenset[int]
    """Whitespace, line breaks and control tokens: not counted in the length of a thought."""
    empty: frozenset[int]
    """These, and tokens of "#" alone: a thought of nothing else is empty."""


@dataclass(frozen=True)
class LatentStats:
    """Counts over transcripts."""

    lines: int
    thoughts: int
    thought_tokens: int
    """Visible tokens of all thoughts."""
    most_common: int
    """Thoughts that are equal to the most frequent one."""
    copies: int
    """Thoughts whose visible text is that of the line below."""

    @property
    def think_rate(self) -> float:
        """Share of lines with a new thought."""
        return self.thoughts / self.lines if self.lines else 0.0

    @property
    def mean_thought_tokens(self) -> float | None:
        """Mean length of a thought in visible tokens; None without thoughts."""
        return self.thought_tokens / self.thoughts if self.thoughts else None

    def metrics(self) -> dict[str, float]:
        """As logged."""
        values: dict[str, float] = {"think_rate": self.think_rate}
        if self.thoughts:
            values["thoughts"] = self.thoughts
            values["mean_thought_tokens"] = self.thought_tokens / self.thoughts
            values["identical_thoughts"] = self.most_common / self.thoughts
            values["copied_thoughts"] = self.copies / self.thoughts
        return values


def blank_tokens(tokenizer: Tokenizer) -> BlankTokens:
    """The tokens that say nothing, of this tokenizer."""
    stripped = [token.strip() for token in tokenizer.token_bytes]
    return BlankTokens(
        invisible=frozenset(i for i, text in enumerate(stripped) if not text),
        empty=frozenset(i for i, text in enumerate(stripped) if not text.strip(b"#")),
    )


def latent_stats(transcripts: Sequence[Transcript], blank: BlankTokens) -> LatentStats:
    """Count the latents of these transcripts."""
    lines = thoughts = tokens = copies = 0
    seen: Counter[tuple[int, ...]] = Counter()
    for transcript in transcripts:
        lines += transcript.num_lines
        for line in np.flatnonzero(transcript.think):
            thought = transcript.ids[transcript.thought_slice(int(line))].tolist()
            said = tuple(t for t in thought if t not in blank.empty)
            expert = transcript.ids[(transcript.lines == line) & (transcript.roles == Role.EXPERT)].tolist()
            thoughts += 1
            tokens += sum(t not in blank.invisible for t in thought)
            seen[said] += 1
            copies += bool(said) and said == tuple(t for t in expert if t not in blank.empty)
    most = seen.most_common(1)[0][1] if seen else 0
    return LatentStats(lines, thoughts, tokens, most, copies)
