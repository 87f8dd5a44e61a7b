"""The task families by name."""

from collections.abc import Callable

from ra3_megatron.config.tasks import Family, TasksConfig
from ra3_megatron.tasks.composition import Composition
from ra3_megatron.tasks.equations import Equations
from ra3_megatron.tasks.hopprog import HopProg
from ra3_megatron.tasks.stateprog import StateProg
from ra3_megatron.tasks.task import TaskFamily

_FAMILIES: dict[Family, Callable[[TasksConfig], TaskFamily]] = {
    "hopprog": HopProg,
    "stateprog": StateProg,
    "composition": Composition,
    "equations": Equations,
}


def build_family(config: TasksConfig) -> TaskFamily:
    """The family that `config` names."""
    return _FAMILIES[config.family](config)
