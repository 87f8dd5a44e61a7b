"""What a configuration takes over from the run that `rlvr.checkpoint` belongs to: architecture, text and tokenizer."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.yaml_io import parse

CONFIG = "config.yaml"
TOKENIZER = Path("corpus") / "tokenizer"


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint stands in (`RUN/checkpoints/PHASE/STEP`); None when it stands in none."""
    for parent in checkpoint.resolve().parents:
        if (parent / CONFIG).is_file():
            return parent
    return None


def inherit(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Put the sections of that run into `values`, but for the keys that the user has `given`."""
    section = values.get("rlvr") if values.get("method") == "rlvr" else None
    checkpoint = section.get("checkpoint") if isinstance(section, dict) else None
    run = run_of(Path(checkpoint)) if isinstance(checkpoint, str) else None
    if run is None:
        return
    there = parse((run / CONFIG).read_text(encoding="utf-8"), str(run / CONFIG))
    if not isinstance(there, dict):
        return
    for name in ("model", "text", "tokenizer"):
        own = given.get(name)
        own = own if isinstance(own, dict) else {}
        taken = there.get(name)
        if not isinstance(taken, dict) or not isinstance(values.get(name), dict):
            continue
        if name == "tokenizer" and (own or not (run / TOKENIZER).is_dir()):
            continue
        keys = {key: value for key, value in taken.items() if key not in own and key != "hf"}
        values[name] |= keys
        if name == "tokenizer":
            values[name]["path"] = str(run / TOKENIZER)
