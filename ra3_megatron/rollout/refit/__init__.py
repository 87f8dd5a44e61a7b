"""Refit: the weights of the sharded trainer into live rollout engines.

    trainer processes                                              engine process
    shards.py ─► plan.py ─► gather.py ─► buckets.py ─► stream.py ══► receiver.py ─► vLLM's loader

`shards` says what a process holds, `plan` who sends what to whom, `gather` puts whole tensors together on a sender,
`buckets` writes Hugging Face tensors into buckets of a fixed size and reads them back, `stream` hands buckets to the
engines, and `refit` is the facade that the trainer calls. `channel`, `buckets`, `carriers`,
`receiver` and `stopwatch` run in the engine's process too: they import neither Megatron-Core nor vLLM.

Invariants:
- An engine sees every tensor of the manifest exactly once and in whole, or its update fails.
- No process holds more than its own weights, the buckets and one whole tensor.
- A failure anywhere ends the update everywhere, within the time limit, and is raised on every trainer process.
"""
