"""A corpus and a configuration small enough that a whole run takes seconds, and the `ra3` command to run them with."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK = {"ra3_megatron.em.infuse:CHUNK": 8}
"""Several chunks an infusion, although there are few documents."""

CONFIG = """
seed: 7
corpus: {source: folder, path: CORPUS, valid_fraction: 0.3}
tokenizer: {vocab_size: 330}
text: {max_latent_tokens: 5}
model:
  {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
   context_length: 160}
warm_start: {steps: 24, global_batch_size: 4, micro_batch_size: 2, optimizer: {learning_rate: 0.03, epsilon: 1.0e-4}}
estep:
  {steps: 2, documents_per_step: 3, group_size: 3, micro_batch_size: 2,
   optimizer: {learning_rate: 0.003, epsilon: 1.0e-3}}  # so that Adam does not blow up rounding errors
mstep: {steps: 2, global_batch_size: 4, micro_batch_size: 2, optimizer: {epsilon: 1.0e-4}}
evaluation: {documents: 6}
parallel: {threads: 1}
checkpoint: {interval: 1000}
logging: {progress: plain}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    output: str
    errors: str


@dataclass
class Ra3:
    """The `ra3` command, in a process of its own for each call."""

    folder: Path
    _server: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        server = Path(__file__).with_name("ra3_server.py")
        self._server = subprocess.Popen(
            [sys.executable, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: object, code: int | None = 0, **request: Any) -> Outcome:
        """Run one command; see ra3_server.py for `request`. An exit code other than `code` fails (None: any)."""
        output, errors = self.folder / "output", self.folder / "errors"
        words = [str(argument) for argument in arguments]
        message = {"arguments": words, "output": str(output), "errors": str(errors), "set": CHUNK} | request
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        outcome = Outcome(answer["code"], output.read_text(), errors.read_text())
        if code is not None:
            assert outcome.code == code, f"{' '.join(words)}\nexit code {outcome.code}\n{outcome.errors}"
        return outcome

    def refuses(self, *arguments: object, **request: Any) -> str:
        """The one line with which a command refuses; its exit code is 2."""
        outcome = self(*arguments, code=2, **request)
        assert outcome.errors.startswith("ra3: ") and outcome.errors.count("\n") == 1, outcome.errors
        return outcome.errors.removeprefix("ra3: ").rstrip("\n")

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def write_corpus(folder: Path, files: int = 10, functions: int = 7) -> Path:
    """Python files of short functions, most lines with a comment above, so that a small model soon writes comments."""
    folder.mkdir(parents=True)
    draw = random.Random(3)
    for file in range(files):
        text = "\n\n".join(_function(draw, f"f{file}_{number}") for number in range(functions))
        (folder / f"module_{file}.py").write_text(text)
    return folder


def _function(draw: random.Random, name: str) -> str:
    a, b = draw.sample(["count", "total", "item", "value", "index"], 2)
    lines = [f"def {name}({a}, {b}):"]
    for _ in range(draw.randint(2, 4)):
        number = draw.randint(0, 9)
        if draw.random() < 0.9:
            lines.append(draw.choice(["    # add", "    # keep it", "    # next"]))
        lines += draw.choice(
            [[f"    {a} = {b} + {number}"], [f"    if {a} > {number}:", f"        {b} = {a}"], [f"    {b} += {number}"]]
        )
    return "\n".join([*lines, f"    return {b}"]) + "\n"


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the fields that depend on the clock."""
    from ra3_megatron.report.metrics import TIME_FIELDS

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS} for line in lines]


def timeless(value: Any) -> Any:
    """A summary, or a part of one, without the figures that depend on the clock."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith(("seconds", "_per_second"))}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard draws of a run: (step, value) of each scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(checkpoint: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name."""
    import tempfile

    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "weights.pt"
        dcp_to_torch_save(checkpoint, file)
        state = torch.load(file, weights_only=False)
    found = {key: value for key, value in _flat(state) if isinstance(value, torch.Tensor)}
    assert found
    return found


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]
