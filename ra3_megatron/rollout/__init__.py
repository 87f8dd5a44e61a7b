"""Sampling of latents and continuations: one protocol, engines behind it, and the jump-ahead sampler on top."""
