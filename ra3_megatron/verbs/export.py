"""The trained models of a run as Hugging Face folders (`export.hf`)."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.families import family_for
from ra3_megatron.report.progress import bytes_progress
from ra3_megatron.training.context import RunContext
from ra3_megatron.training.phases import Phase, final_of, is_done
from ra3_megatron.verbs.processes import on_main

ARMS = {"ra3": "mstep", "ntp": "ntp"}
"""Names of the folders, and the phase whose last model each holds."""


def check_export(config: RunConfig) -> None:
    """UserError when the model of a run that is to be exported cannot be."""
    if config.export.hf and config.model.hf is None:
        family_for(config.model)


def export_models(run: RunContext) -> list[Path]:
    """Write what the run trained to `<run>/hf/`; the folders. Collective."""
    if not run.config.export.hf:
        return []
    settings, folders = run.config.export, []
    for arm, name in ARMS.items():
        done = [phase for i in range(1, run.config.em.iterations + 1) if is_done(run, phase := Phase(name, i))]
        if not done:
            continue
        checkpoint, out = final_of(run, done[-1]), run.folder.path / "hf" / arm
        folders.append(out)

        def export(source: Path = checkpoint, target: Path = out, arm: str = arm) -> Any:
            shown = bytes_progress(run.progress, f"exporting {arm}, MB")
            export_hf(source, target, settings.dtype, int(settings.max_shard_gb * 1e9), progress=shown)

        on_main(run.runtime, export)
    return folders
