"""Evaluation of checkpoints on code and mathematics, scored by the code of the harnesses that people cite."""
