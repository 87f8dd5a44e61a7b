"""RA3 mid-training (EM with latent thoughts) on Megatron-Core."""

__version__ = "0.1.0"
