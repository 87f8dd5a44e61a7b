"""A model becomes a Hugging Face folder in FP8 that vLLM loads, whole or absent.

The folder has modelopt's tensors and `hf_quant_config.json`, the small files of the original with `quantization_config`
in `config.json`, and a report of what FP8 cost (`fp8_report.json`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import FILE, ConfigJson
from ra3_megatron.hf.conversion import OnBytes, convert
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.files import GENERATION, keep_small_files, small_files, with_dtype
from ra3_megatron.hf.fp8.measure import Written, compare_outputs, compare_weights, report_of, steps
from ra3_megatron.hf.fp8.passages import CalibrationSettings, Passages, encode
from ra3_megatron.hf.fp8.quantise import modelopt_version, quantise
from ra3_megatron.hf.importing import model_of
from ra3_megatron.hf.origin import origin_of
from ra3_megatron.hf.source import Source
from ra3_megatron.hf.weights import manifest
from ra3_megatron.mcore.checkpoint_contents import read_contents
from ra3_megatron.mcore.checkpoint_files import facts_of
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.text.files import write_atomic
from ra3_megatron.text.tokenizer import HFTokenizer

REPORT = "fp8_report.json"
QUANT_CONFIG = "hf_quant_config.json"
_ORIGINAL = ".original"
"""Folder inside the unfinished one that holds a checkpoint in Hugging Face's format while it is needed."""
StartTask = Callable[[str, int], Callable[[int, int], None]]
"""Called with the name of a task and its number of steps; what it gives is called with steps and tokens done."""


@dataclass(frozen=True)
class FP8Job:
    """What is to be quantised, and how: the only unit of its conversion is its end."""

    source: Path
    is_checkpoint: bool
    """`source` is a checkpoint of ours, not a Hugging Face folder."""
    passages: Passages
    settings: CalibrationSettings
    corpus: str
    """Names the texts in errors and in the report."""
    device: str
    compare: bool
    modelopt: str
    start: StartTask

    def sizes(self) -> list[int]:
        return []

    def run(self, unit: int, folder: Path, on_bytes: OnBytes) -> dict[str, Any]:
        raise AssertionError("has no units")

    def finish(self, folder: Path, results: Any) -> None:
        original = self.source
        if self.is_checkpoint:
            original = folder / _ORIGINAL
            export_hf(self.source, original)
        source, wanted = _checked_source(original)
        vocabulary = model_of(original)[2]
        if not HFTokenizer.saved_in(original):
            raise UserError(f"{original}: holds no tokenizer (tokenizer.json), which calibration needs")
        tokenizer = HFTokenizer.load(original, vocabulary)
        length = min(self.settings.length, model_of(original)[1].context_length)
        calibration, held_out = (
            encode(passages, tokenizer, length, self.corpus)
            for passages in (self.passages.calibration, self.passages.held_out)
        )
        advance = self.start("calibrating", len(calibration))
        quantise(original, folder, calibration, self.device, lambda tokens: advance(1, tokens))
        self._write_small_files(original, folder)
        written = Written(folder)
        checked = self.start("reading back", steps(written))
        weights = compare_weights(written, source, wanted, lambda: checked(1, 0))
        outputs = None
        if self.compare:
            compared = self.start("comparing", len(held_out))
            outputs = compare_outputs(written, original, held_out, self.device, lambda n: compared(1, n))
        about = {
            "format": "FP8 e4m3, one scale a tensor for weights and inputs of linear layers; the rest bf16",
            "modelopt": self.modelopt,
            "corpus": self.corpus,
            "calibration": {
                "sequences": len(calibration),
                "tokens": sum(map(len, calibration)),
                "length": length,
                "seed": self.settings.seed,
            },
        }
        write_atomic(folder / REPORT, report_of(weights, outputs, about).encode())
        shutil.rmtree(folder / _ORIGINAL, ignore_errors=True)

    def _write_small_files(self, original: Path, folder: Path) -> None:
        """Those of the original, with modelopt's `quantization_config`."""
        quantization = json.loads((folder / FILE).read_text(encoding="utf-8"))["quantization_config"]
        (folder / GENERATION).unlink(missing_ok=True)  # modelopt's, of no model in particular
        keep_small_files(original, folder)
        values = with_dtype(ConfigJson.read(original).values, "bf16") | {"quantization_config": quantization}
        write_atomic(folder / FILE, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def export_fp8(
    source: Path,
    is_checkpoint: bool,
    out: Path,
    draw: Callable[[], Passages],
    settings: CalibrationSettings,
    corpus: str,
    device: str,
    compare: bool,
    start: StartTask,
) -> bool:
    """Write the model of a checkpoint, or of a Hugging Face folder, in FP8 to `out`; False when that has been done.

    draw: gives the passages to calibrate and to compare on. compare: run both models, not only their tensors.
    Raises UserError for what cannot be quantised; then nothing is left behind.
    """
    version = modelopt_version()
    settings.check()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device={device}: there is no NVIDIA GPU here: use --device cpu")
    _refuse_experts(source, _model_of(source, is_checkpoint))
    passages = draw()
    job = FP8Job(source, is_checkpoint, passages, settings, corpus, device, compare, version, start)
    identity = {
        "conversion": "FP8",
        "ra3": __version__,
        "modelopt": version,
        "source": _source_identity(source, is_checkpoint),
        "calibration": asdict(settings),
        "passages": hashlib.sha256(json.dumps(asdict(passages)).encode()).hexdigest(),
        "device": device,
        "compare": compare,
    }
    return convert(job, out, identity)


def _model_of(source: Path, is_checkpoint: bool) -> ModelConfig:
    return origin_of(source, read_contents(source).record).model if is_checkpoint else model_of(source)[1]


def _refuse_experts(source: Path, model: ModelConfig) -> None:
    """modelopt 0.43 cannot export the experts of transformers 5, which are stacked in one tensor a layer."""
    if model.num_experts is not None:
        raise UserError(
            f"{source}: has {model.num_experts} experts a layer: modelopt 0.43 cannot export a mixture of experts of "
            "transformers 5 (its experts are one stacked tensor): use megatron-to-hf, and FP8 in the serving engine"
        )


def _checked_source(folder: Path) -> tuple[Source, list[str]]:
    """Names and shapes as the family has them; the tensors of the folder, and the names of the model's."""
    family, model, vocabulary = model_of(folder)
    source = Source.open(folder)
    links = family.links(model, vocabulary)
    source.check(links)
    wanted = list(manifest(links))
    for name in wanted:
        source.read(name, torch.float32)  # refuses NaN and infinite numbers by name
    return source, wanted


def _source_identity(source: Path, is_checkpoint: bool) -> Any:
    if is_checkpoint:
        return hashlib.sha256((source / RECORD).read_bytes()).hexdigest()
    files = Source.open(source).files
    return {
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "small_files": {name: facts_of(source / name)["sha256"] for name in small_files(source)},
    }
