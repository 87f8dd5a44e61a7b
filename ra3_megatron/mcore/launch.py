"""What started this process: torchrun, srun, or nobody. Imports nothing of Megatron-Core."""

import os

SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""Variables of torchrun, and those of srun that say the same."""


def launched() -> bool:
    """Whether torchrun or srun started this process as one of several (or of one)."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ)


def adopt_slurm() -> None:
    """Give a process of srun the variables that torchrun would have set; those that are set stay."""
    if launched():
        for name, source in SLURM.items():
            if source in os.environ:
                os.environ.setdefault(name, os.environ[source])
