"""What tests need of the sandbox's limits beside the program."""

from collections.abc import Iterable
from dataclasses import replace

from ra3_megatron.rlvr.sandbox import Limits

MIB = 2**20


def with_room(limits: Limits, cases: Iterable[tuple[str, str]]) -> Limits:
    """With room for twice the longest output that is expected, and for what the runner holds: all cases, and all
    once more while it reads them."""
    sizes = [[len(text.encode("utf-8", "surrogatepass")) for text in case] for case in cases]
    longest = max((expected for _, expected in sizes), default=0)
    held = 2 * sum(map(sum, sizes)) // MIB
    return replace(
        limits, output_kib=max(limits.output_kib, 1 + 2 * longest // 1024), memory_mib=limits.memory_mib + held
    )
