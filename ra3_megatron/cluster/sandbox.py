"""Whether programs that a model writes can be executed on a node."""

import shutil

from ra3_megatron.cluster.results import Result
from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandboxing.command import require_bubblewrap
from ra3_megatron.rlvr.sandboxing.limits import Isolation

CHECK = "sandbox"


def check(node: str) -> Result:
    """Runs a program behind bubblewrap."""
    try:
        require_bubblewrap(Isolation.BUBBLEWRAP)
    except UserError as problem:
        return Result(node, CHECK, "bad", str(problem), "no")
    return Result(node, CHECK, "ok", f"{shutil.which('bwrap')} works", "yes")
