"""What the trainer and the process that hosts vLLM tell each other. Plain picklable classes; no torch, no vLLM."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Address = str | tuple[str, int]
"""Path of a unix socket, or host and port."""

Manifest = dict[str, tuple[int, ...]]
"""Hugging Face name and shape of every tensor of a model."""


@dataclass(frozen=True)
class EngineSpec:
    """What a vLLM process is to hold."""

    model: str
    """Folder with the model's config.json."""
    sets: npt.NDArray[np.bool_]
    """Table of token sets, [rows, vocabulary]; row 0 is every token."""
    max_model_len: int
    """Longest sequence in tokens, the sampled ones included."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: the weights that arrive are quantised to e4m3 as they are loaded, at every update; needs bfloat16."""
    cuda_graphs: bool = True
    """Whether the decode loop is captured in CUDA graphs, on GPUs."""
    tensor_parallel: int = 1
    devices: tuple[str, ...] = ()
    """GPUs it may use, as CUDA_VISIBLE_DEVICES names them; (): all that its starter sees."""
    threads: int = 1
    """CPU threads of each of its processes."""
    max_sequences: int = 256
    """Sequences computed at once."""
    kv_cache_gib: float = 1.0
    """Memory of the key/value cache."""
    prefix_caching: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Events:
    """Ask for log P(next token in A | next token in B) behind prefixes of one sequence."""

    ids: list[int]
    places: list[int]
    """Length of each prefix."""
    numerators: list[int]
    """Row A of the table of token sets at each place."""
    denominator: int
    """Row B."""


@dataclass(frozen=True)
class Draw:
    """Ask for a continuation of a prompt with at most `len(uniforms)` tokens."""

    prompt: list[int]
    uniforms: list[float]
    first: tuple[int, int]
    """Rows of the table for the first token: those that may come, and those over which it is normalised."""
    later: tuple[int, int]
    """The same for the tokens behind it."""
    stop_row: int | None = None
    """Row of the tokens that end the continuation."""
    stop: frozenset[int] = frozenset()
    """Further tokens that end it."""
    greedy: bool = False
    top_p: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """A continuation."""

    ids: list[int]
    log_probs: list[float]
    ended: bool
    """The last token ends it; else its length did."""


@dataclass(frozen=True)
class Answer:
    """What came of a list of Events and Draws, in their order, and the version of the weights behind it."""

    values: list[list[float] | Drawn]
    version: int
    prompt_tokens: int
    """Tokens of all prompts, prefixes of events among them."""
    cached_tokens: int
    """Those of them that the prefix cache held."""


@dataclass(frozen=True)
class Health:
    """What a vLLM process says of itself."""

    pid: int
    vllm: str
    """Version of the package."""
    version: int | None
    """Version of the weights; None: none are loaded, or the last update failed."""
    manifest: Manifest
    """The tensors that an update must bring."""


class WeightSource(Protocol):
    """A picklable description of where new weights come from, used in every process that holds a share of the model."""

    def manifest(self) -> Mapping[str, tuple[int, ...]]:
        """Hugging Face name and shape of every tensor that `tensors` gives."""
        ...

    def tensors(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Each tensor once, layer by layer. vLLM keeps some until their layer is complete, so none may be overwritten.
        A generator is closed when something goes wrong."""
        ...


@dataclass(frozen=True)
class Call:
    """A request to the server: the name of one of its methods, and the arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The server's answer to a call."""

    value: Any = None
    refused: str | None = None
    """Why the call was refused; the server goes on."""
    failed: str | None = None
    """What went wrong inside the server, which ends with this reply."""


@dataclass(frozen=True)
class Start:
    """What a new process is told."""

    spec: EngineSpec
    address: Address
    """Where to listen; port 0: a free one."""
    authkey: bytes = field(repr=False)
    parent: int = 0
    """Process id of the one that started it, whose end is the server's."""


@dataclass(frozen=True)
class Ready:
    """First and only message of a new process through its pipe."""

    address: Address | None = None
    """Where it listens."""
    failed: str | None = None
    """Why it could not start."""
