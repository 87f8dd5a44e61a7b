"""Hugging Face checkpoints: what their config.json says, and one weight map per family for import, export and refit."""
