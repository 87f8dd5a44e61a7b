"""The parts of the suite, most important first. Importing this loads nothing."""

PARTS = {
    "kernels": "Transformer Engine's layers and FusedAdam against fp32 references",
    "equality": "the model on this device equals the model on the CPU",
    "fp8": "FP8 is never silently off",
    "training": "M-step and E-step in every precision, side by side",
    "checkpoints": "checkpoints CPU - device - CPU, and a resumed run, bit for bit",
    "offload": "offload: the same numbers, memory and time of a step with and without",
    "throughput": "train step: tokens/s, MFU, memory, profile, against plain PyTorch",
    "rollouts": "rollouts: jump-ahead against one request per line; decoding",
    "refit": "refit: weights into a process beside the trainer, against a copy",
    "hopprog": "RA3 on HopProg, a short run",
}
"""Name of a part, which is a module `tests.gpu.<name>` with `run(evidence, setting)` -> what it is about."""
