"""Whether the nodes of a job are fit to train on: found out before training starts, and said by name."""
