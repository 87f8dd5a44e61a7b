"""Pure Python, no torch: primitive actions, latent formats, transcripts, tokenizers."""
