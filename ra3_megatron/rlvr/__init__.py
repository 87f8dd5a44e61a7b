"""Reinforcement learning with verifiable rewards: programs that a policy writes, rewarded by tests that are executed.

`problems` is what is asked, `sandbox` executes the answers, `advantages` holds the equations, `grpo` takes the updates,
`loop` is one run.
"""
