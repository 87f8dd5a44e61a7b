"""All that knows Megatron-Core.

Importing this package prepares Megatron-Core for machines without CUDA (`cpu.install`), so it must come before any
`megatron.core` import; every other room reaches Megatron-Core through here.
"""

import logging
import warnings

import torch

from ra3_megatron.mcore import cpu, libraries

# What Megatron-Core and torch say at every start on a machine without Transformer Engine; `ra3 --version` says it once.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`load_state_dict` is deprecated and will be removed",
    "Please use DTensor instead",
    "When using async grad allreduce",
    "If you are using transformer_engine as the transformer implementation, the core_attn",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=_message)

# A checkpoint that cannot be written is raised as an error, and reported once.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)

if torch.cuda.is_available():
    libraries.share_cudnn()
cpu.install()
