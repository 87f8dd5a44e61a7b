"""The weights that a run starts from: a checkpoint, or a Hugging Face folder that is converted into the run folder."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.hf.files import keep_small_files
from ra3_megatron.hf.importing import HF_FOLDER, import_hf
from ra3_megatron.hf.origin import RUN_FOLDER
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.report.progress import bytes_progress
from ra3_megatron.report.run_folder import RunFolder
from ra3_megatron.training.phases import FINAL
from ra3_megatron.verbs.processes import on_main


def hf_source(folder: RunFolder) -> Path | None:
    """The small files of the Hugging Face folder that a run started from; None when it started from none."""
    kept = folder.path / RUN_FOLDER
    return kept if kept.is_dir() else None


def base_checkpoint(
    config: RunConfig, folder: RunFolder, runtime: Runtime, progress: Any, named: str | None
) -> Path | None:
    """The checkpoint to start from: `named`, or the converted folder `model.hf`; None: initial weights. Collective.

    Raises UserError when the folder `model.hf` cannot be converted.
    """
    kept = folder.path / RUN_FOLDER
    if config.model.hf is None:
        if named is None:
            return None
        checkpoint = Path(named)
        if (checkpoint / HF_FOLDER).is_dir():  # it was converted
            on_main(runtime, lambda: keep_small_files(checkpoint / HF_FOLDER, kept))
        return checkpoint
    source, target = Path(config.model.hf), folder.checkpoints / "hf" / FINAL

    def convert_once() -> None:
        if (target / RECORD).is_file():  # the folder's weights need not be there any more
            return
        keep_small_files(source, kept)
        shown = bytes_progress(progress, f"converting {source.name}, MB")
        import_hf(source, target, config.model.weight_type, progress=shown)

    on_main(runtime, convert_once)
    return target
