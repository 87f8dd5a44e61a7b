"""Refit: the trainer's weights into the memory of a process beside it, against a copy within the device.

`benchmarks/refit.py` measures both: weights are gathered into buckets, shared with the other process (on a GPU by a
CUDA IPC handle), copied there, and dropped. An engine's own loading comes on top. Where the host's time went is
reported part by part: the parts of one side add up to the refit, and its largest one is what holds it up.
"""

from __future__ import annotations

from benchmarks import refit
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.scaling.tables import architecture_named
from tests.gpu.evidence import Evidence
from tests.gpu.setting import Setting, with_precision

BUCKET = 256 * 2**20
"""Bytes of a bucket, as a run has them."""
OPEN = "receiver: open"
"""Part of the receiver's time in which it opens handles."""
TINY = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)


def run(evidence: Evidence, setting: Setting) -> None:
    """Weights of Llama-3.2-1B's shape through shared memory."""
    evidence.missing("refit by NCCL", "needs a receiver on another GPU: two processes on one GPU cannot form a group")
    evidence.missing("refit into vLLM", "needs vLLM; tests/run/test_vllm_run.py has it")
    made = architecture_named("llama3.2-1b")
    name, shape, size = setting.pick(("1B-shaped", made.model, made.vocab_size), ("tiny", TINY, 256))
    shape = with_precision(shape, "bf16" if setting.cuda else "fp32")
    with evidence.attempt(name):
        repeats, bucket = setting.pick((5, BUCKET), (2, 2**20))
        timings, parameters, sent, parts = refit.in_process({}, "shared", repeats, shape, size, bucket)
        evidence.figure(f"{name}: sent", sent / 1e9, "GB", note=f"{parameters / 1e6:.1f} million parameters")
        evidence.rate(f"{name}: refit", timings[refit.REFIT], sent / 1e9, "GB/s")
        evidence.rate(f"{name}: copy within the device", timings[refit.COPY], sent / 1e9, "GB/s")
        share = timings[refit.COPY].median / timings[refit.REFIT].median
        evidence.figure(f"{name}: refit, of the copy", share)
        buckets = -(-sent // bucket)
        for part, seconds in parts.items():
            if part == OPEN:  # once for a connection, in the first refit
                evidence.figure(f"{name}: {part}, once", 1e3 * seconds[0], "ms")
            else:
                usual = 1e3 * refit.usual(seconds, repeats)
                evidence.figure(f"{name}: {part}", usual, "ms", note=f"{usual / buckets:.3f} ms a bucket")
