"""The vLLM rollout engine: a process of its own that hosts vLLM, and the engine in the trainer that talks to it.

    trainer: engine.py ── process.py ──(messages.py over a socket)── server.py ── worker.py, logits.py, weights.py

Only server.py, worker.py, logits.py, weights.py and manifest.py run in vLLM's process, and import vLLM or torch there;
none of them imports Megatron-Core. The trainer's side imports neither vLLM nor torch.
"""
