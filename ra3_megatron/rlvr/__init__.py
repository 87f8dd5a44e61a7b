"""Reinforcement learning with verifiable rewards: programs that a model wrote, run and graded."""
