"""A sample, and what scoring says of it."""

from dataclasses import dataclass, field
from typing import Any

_FIELDS = ("completion", "solution", "number", "tokens", "thought_tokens")


@dataclass(frozen=True)
class Sample:
    """What a model wrote for one task. Exactly one of `completion` and `solution` is there."""

    task_id: str
    completion: str | None = None
    """Continues the prompt."""
    solution: str | None = None
    """A whole program."""
    number: int | None = None
    """Which of the task's samples it is, from 0; None: not ours."""
    tokens: int | None = None
    """Tokens that were sampled, up to the cut; None: not ours."""
    thought_tokens: int | None = None
    """Those of them that belong to thoughts."""

    def row(self) -> dict[str, Any]:
        """In the harnesses' own form, with our counts beside."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {"task_id": self.task_id, **{name: value for name, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Score:
    """What the harness says of a sample."""

    scores: dict[str, float] = field(default_factory=dict)
    """By metric: 1 right, 0 wrong."""
    detail: str = ""
    """In the harness's words."""
