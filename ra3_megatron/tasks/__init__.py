"""Generated tasks whose true boundaries, latents and tests are known."""
