"""The model that Hugging Face transformers makes of a folder, which ours is compared with."""

from pathlib import Path
from typing import Any

import torch

from ra3_megatron.config.errors import UserError


def load_reference(folder: Path, **options: Any) -> Any:
    """In fp32, ready to be asked: 4 bytes a parameter. options: further ones of `from_pretrained`.

    Raises UserError when transformers cannot load it: its releases refuse different things.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, **options
        )
    except Exception as error:  # of any kind
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: transformers {transformers.__version__} cannot load it ({said})") from error
    return model.eval()
