"""What the trainer and the host of a rollout node tell each other. Plain picklable classes; no torch, no vLLM."""

from dataclasses import dataclass, field
from typing import Literal

from ra3_megatron.rollout.vllm.messages import Address, EngineSpec


@dataclass(frozen=True)
class Offer:
    """A node's first message: what it can host."""

    node: str
    """Its name, for people."""
    address: str
    """At which the trainer reaches its engines."""
    cores: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    engines: int | None
    """Engines it takes; none: as many as its GPUs allow, without GPUs one."""


@dataclass(frozen=True)
class Begin:
    """Start an engine."""

    number: int
    """Of the engine, among all of the run."""
    spec: EngineSpec
    """With the name of its model's folder, inside the shared folder."""
    log: str
    """Name of the file for its output, there."""


@dataclass(frozen=True)
class Begun:
    """An engine listens."""

    number: int
    address: Address
    authkey: bytes = field(repr=False)


@dataclass(frozen=True)
class Failed:
    """An engine did not come up."""

    number: int
    why: str


@dataclass(frozen=True)
class End:
    """Tell how an engine ended; end it if it has not."""

    number: int
    how: Literal["close", "kill", "epitaph"]
    """`close`: its connection was closed, so it is about to end; `kill`: at once; `epitaph`: it is dead or dying."""


@dataclass(frozen=True)
class Ended:
    """The answer to End."""

    number: int
    epitaph: str


@dataclass(frozen=True)
class Done:
    """No attempt follows."""


Answer = Begun | Failed | Ended
