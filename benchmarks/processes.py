"""A function in several processes of this machine, as torchrun starts them."""

import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(processes: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returned on rank 0."""
    layout = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    return elastic_launch(layout, function)(*arguments)[0]
