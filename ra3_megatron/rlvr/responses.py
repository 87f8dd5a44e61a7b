"""A sampled response to a problem, and the program that it stands for."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ra3_megatron.rollout.protocol import Completion, Finish
from ra3_megatron.text.latents import marked_text
from ra3_megatron.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """Token ids of a prompt and what the policy wrote behind it."""

    problem: int
    """Index of the problem."""
    ids: npt.NDArray[np.int32]
    """Prompt and response, [tokens]."""
    prompt_tokens: int
    """How many of them are the prompt's."""
    log_probs: npt.NDArray[np.float32]
    """log policy of each token when it was sampled, [tokens]; 0 for the prompt's."""
    finish: Finish
    weight_version: int
    """Of the weights that sampled it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.ids)

    @property
    def response_tokens(self) -> int:
        """Tokens that were sampled."""
        return len(self.ids) - self.prompt_tokens

    @cached_property
    def sampled(self) -> npt.NDArray[np.bool_]:
        """Tokens that were sampled, [tokens]."""
        return np.arange(len(self.ids)) >= self.prompt_tokens

    @property
    def cut(self) -> bool:
        """Whether it reached its greatest length."""
        return self.finish is Finish.LENGTH

    def text(self, tokenizer: Tokenizer) -> str:
        """What was written, thoughts included; latent markers by their names."""
        return marked_text(self.ids[self.prompt_tokens :].tolist(), tokenizer)


def response_of(problem: int, prompt: Sequence[int], completion: Completion) -> Response:
    """The response that a completion of a problem's prompt is."""
    return Response(
        problem=problem,
        ids=np.array([*prompt, *completion.ids], dtype=np.int32),
        prompt_tokens=len(prompt),
        log_probs=np.array([0.0] * len(prompt) + completion.log_probs, dtype=np.float32),
        finish=completion.finish,
        weight_version=completion.weight_version,
    )


def pack(responses: Sequence[Response]) -> dict[str, Any]:
    """Responses as JSON values, exactly."""
    stream = io.BytesIO()
    empty = np.zeros(0)
    np.savez_compressed(
        stream,
        ids=np.concatenate([r.ids for r in responses]) if responses else empty,
        log_probs=np.concatenate([r.log_probs for r in responses]) if responses else empty,
    )
    return {
        "problems": [r.problem for r in responses],
        "tokens": [r.num_tokens for r in responses],
        "prompt_tokens": [r.prompt_tokens for r in responses],
        "finish": [r.finish.value for r in responses],
        "weight_versions": [r.weight_version for r in responses],
        "arrays": base64.b64encode(stream.getvalue()).decode("ascii"),
    }


def unpack(packed: dict[str, Any]) -> list[Response]:
    """The inverse of `pack`."""
    ends = np.cumsum(packed["tokens"], dtype=np.int64)[:-1]
    with np.load(io.BytesIO(base64.b64decode(packed["arrays"])), allow_pickle=False) as arrays:
        ids, log_probs = np.split(arrays["ids"], ends), np.split(arrays["log_probs"], ends)
    return [
        Response(problem, ids[n], prompt, log_probs[n], Finish(finish), version)
        for n, (problem, prompt, finish, version) in enumerate(
            zip(packed["problems"], packed["prompt_tokens"], packed["finish"], packed["weight_versions"], strict=True)
        )
    ]
