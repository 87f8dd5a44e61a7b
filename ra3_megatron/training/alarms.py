"""A sign of failure, as every monitor reports it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """A sign of failure that was seen."""

    name: str
    message: str
    advice: str
