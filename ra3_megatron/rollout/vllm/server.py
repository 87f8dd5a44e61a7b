"""The process that hosts one vLLM engine: `python -m ra3_megatron.rollout.vllm.server START READY_FD`.

It reads a pickled `Start` from the file START, which only its user can read, builds the engine, listens, tells its
address through the pipe READY_FD, and answers the calls of one owner, one after another, until the owner closes or goes
away. It ends when the process that started it ends, however that ends. process.py is the other side.

Fail closed: it samples only with weights of a whole update, and stamps their version on every answer. An update that
fails leaves it without weights. An error that is not a refusal ends it.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # read when vLLM is imported; there is nothing to gain on a CPU

import vllm
from vllm import LLM, SamplingParams

from ra3_megatron.rollout.vllm.logits import KEY, Choices, Instruction, Stash
from ra3_megatron.rollout.vllm.messages import (
    Answer,
    Call,
    Draw,
    Drawn,
    EngineSpec,
    Events,
    Health,
    Manifest,
    Ready,
    Reply,
    Start,
    WeightSource,
)
from ra3_megatron.rollout.vllm.wire import limit, tune
from ra3_megatron.text.lifetime import end_with

logger = logging.getLogger(__name__)

CPU_BLOCK, GPU_BLOCK = 32, 16
"""Tokens of a block of the prefix cache, the fewest that vLLM's attention takes: what a request shares with others is
whole blocks, and the rest is computed again."""

LEAST_MEMORY = 0.01
"""Share of a GPU's memory that must be free at the start. The size of the cache is given, so vLLM reserves no share."""

HANDSHAKE_SECONDS = 5.0
"""Whoever connects must have proved by then that it knows the key."""


class Refused(Exception):
    """A call that cannot be answered; the message says why, and the engine is as it was."""


class EngineServer:
    """One vLLM engine and the calls it answers (the public methods)."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        on_cpu = not torch.cuda.is_available()
        self._llm = LLM(
            model=spec.model,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            dtype=spec.dtype,
            quantization=None if spec.quantization == "none" else spec.quantization,
            enforce_eager=on_cpu or not spec.cuda_graphs,
            block_size=CPU_BLOCK if on_cpu else GPU_BLOCK,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_sequences,
            kv_cache_memory_bytes=int(spec.kv_cache_gib * 2**30),
            gpu_memory_utilization=LEAST_MEMORY,
            enable_prefix_caching=spec.prefix_caching,
            tensor_parallel_size=spec.tensor_parallel,
            async_scheduling=False,
            seed=spec.seed,
            logits_processors=[f"{Choices.__module__}:{Choices.__name__}"],
            worker_extension_cls="ra3_megatron.rollout.vllm.worker.WorkerExtension",
            disable_log_stats=True,
        )
        vocabulary = self._llm.model_config.get_vocab_size()
        if spec.sets.shape[1] != vocabulary:
            raise ValueError(f"token sets of {spec.sets.shape[1]} tokens for a model of {vocabulary}")
        self._llm.collective_rpc("ra3_set_table", args=(spec.sets,))
        self._stops = [int(row.argmax()) if row.any() else None for row in spec.sets]
        self._manifest: Manifest = self._llm.collective_rpc("ra3_manifest")[0]
        self._version: int | None = None
        self._why_empty = "no weights were loaded yet"

    def health(self) -> Health:
        return Health(os.getpid(), vllm.__version__, self._version, self._manifest)

    def update(self, version: int, source: WeightSource) -> None:
        """Take the weights of `version`; every later answer is theirs."""
        self._version = None
        self._why_empty = f"the update to weight version {version} failed"
        failures = [why for why in self._llm.collective_rpc("ra3_update", args=(source,)) if why]
        if failures:
            self._why_empty += f": {failures[0]}"
            raise Refused(self._why_empty)
        if not self._llm.reset_prefix_cache():
            self._why_empty += ": the prefix cache could not be reset"
            raise Refused(self._why_empty)
        self._version = version

    def sample(self, asked: Sequence[Events | Draw], temperature: float) -> Answer:
        """Evaluate events and sample continuations."""
        if self._version is None:
            raise Refused(f"the vLLM engine holds no usable weights ({self._why_empty})")
        prompts: list[dict[str, list[int]]] = []
        instructions: list[Instruction] = []
        for request in asked:
            for prompt, instruction in self._instructions(request, temperature):
                length = len(prompt) + max(1, len(instruction.uniforms))
                if not prompt:
                    raise Refused("an empty prompt cannot be continued")
                if length > self._spec.max_model_len:
                    raise Refused(f"a sequence of {length} tokens is longer than {self._spec.max_model_len}")
                prompts.append({"prompt_token_ids": prompt})
                instructions.append(replace(instruction, number=len(instructions)))
        outputs, cached = self._generate(prompts, instructions)
        values: list[list[float] | Drawn] = []
        done = iter(outputs)
        for request in asked:
            if isinstance(request, Events):
                values.append([next(done).log_probs[0] for _ in request.places])
            else:
                values.append(next(done))
        return Answer(values, self._version, sum(len(prompt["prompt_token_ids"]) for prompt in prompts), cached)

    def _instructions(self, request: Events | Draw, temperature: float) -> list[tuple[list[int], Instruction]]:
        if isinstance(request, Events):
            return [
                (request.ids[:place], Instruction(0, temperature, first=(numerator, request.denominator)))
                for place, numerator in zip(request.places, request.numerators, strict=True)
            ]
        written_end = None
        if request.stop_row is not None:
            written_end = self._stops[request.stop_row]
        elif request.stop:
            written_end = min(request.stop)
        return [
            (
                request.prompt,
                Instruction(
                    number=0,
                    temperature=temperature,
                    first=request.first,
                    later=request.later,
                    uniforms=tuple(request.uniforms),
                    stop_row=request.stop_row,
                    stop=request.stop,
                    written_end=written_end,
                    greedy=request.greedy,
                    top_p=request.top_p,
                ),
            )
        ]

    def _generate(
        self, prompts: list[dict[str, list[int]]], instructions: list[Instruction]
    ) -> tuple[list[Drawn], int]:
        """What came of each request, and how many tokens of the prompts were cached."""
        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=max(1, len(instruction.uniforms)),
                stop_token_ids=[] if instruction.written_end is None else [instruction.written_end],
                ignore_eos=True,
                detokenize=False,
                extra_args={KEY: instruction},
            )
            for instruction in instructions
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        stash: Stash = self._llm.collective_rpc("ra3_take")[0]
        drawn = [
            _drawn(instruction, stash, list(output.outputs[0].token_ids), self._spec)
            for instruction, output in zip(instructions, outputs, strict=True)
        ]
        return drawn, sum(output.num_cached_tokens or 0 for output in outputs)


def _drawn(instruction: Instruction, stash: Stash, written: list[int], spec: EngineSpec) -> Drawn:
    """The result of one request, checked against what vLLM wrote."""
    ids, log_probs = stash.tokens[instruction.number], stash.log_probs[instruction.number]
    if any(value != value or value == float("inf") for value in log_probs):
        raise RuntimeError(f"log-probabilities are not finite: {log_probs}")
    if not instruction.uniforms:
        return Drawn([], log_probs, True)
    ended = ids[-1] in instruction.stop or (
        instruction.stop_row is not None and bool(spec.sets[instruction.stop_row, ids[-1]])
    )
    expected = [*ids[:-1], instruction.written_end] if ended else ids
    if written != expected:
        raise RuntimeError(f"vLLM wrote {written} where {expected} was chosen")
    return Drawn(ids, log_probs, ended)


def accept(listener: Listener, authkey: bytes) -> Connection:
    """The first connection that knows the key."""
    while True:
        connection = listener.accept()
        try:
            limit(connection, HANDSHAKE_SECONDS)
            deliver_challenge(connection, authkey)
            answer_challenge(connection, authkey)
            limit(connection, 0.0)
            tune(connection)
        except Exception as error:  # a stranger may send anything
            connection.close()
            logger.warning("a connection was refused: %s %s", type(error).__name__, error)
            continue
        return connection


def serve(server: EngineServer, owner: Connection) -> bool:
    """Answer calls until the owner closes; whether all went well."""
    while True:
        try:
            call: Call = owner.recv()
        except (EOFError, OSError):
            return True
        if call.method == "close":
            owner.send(Reply())
            return True
        reply = _answer(server, call)
        try:
            owner.send(reply)
        except OSError:
            return True
        if reply.failed:
            return False


def _answer(server: EngineServer, call: Call) -> Reply:
    try:
        return Reply(getattr(server, call.method)(*call.arguments))
    except Refused as refusal:
        return Reply(refused=str(refusal))
    except Exception as error:
        traceback.print_exc()
        return Reply(failed=one_line(error))


def one_line(error: Exception) -> str:
    """An error's kind and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> int:
    # they ask the trainer to save, which ends this process then, or to show its stacks
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    path, ready = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(ready, False)
    start: Start = pickle.loads(path.read_bytes())
    path.unlink()
    end_with(start.parent)
    with os.fdopen(ready, "wb") as pipe:
        try:
            server = EngineServer(start.spec)
            listener = Listener(start.address)
        except Exception as error:
            traceback.print_exc()
            pickle.dump(Ready(failed=one_line(error)), pipe)
            return 1
        pickle.dump(Ready(listener.address), pipe)
    with listener:
        owner = accept(listener, start.authkey)
    with contextlib.suppress(OSError):
        path.parent.rmdir()  # its starter's, which may be killed and leave it
    with owner:
        return 0 if serve(server, owner) else 1


if __name__ == "__main__":
    status: Any = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # vLLM's threads and workers have nothing to save
