"""RA3 itself: mid-training as EM over latent thoughts.

`objective` holds the equations, `estep` trains the latent policy q against the frozen model pi, `infuse` writes the
corpus with latents sampled by q, `mstep` trains pi on it, `loop` alternates them and `monitors` names what goes wrong.
"""
