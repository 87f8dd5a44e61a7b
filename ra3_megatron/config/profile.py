"""Which steps are looked at closely, and with what."""

from typing import Annotated, Literal

from pydantic import Field

from ra3_megatron.config.base import Section


class ProfileConfig(Section):
    """Profiles of single training steps, in `<run>/profile` (docs/profiling.md). They change no number."""

    steps: list[Annotated[int, Field(ge=1)]] = []
    """Steps that are profiled, counted from 1 in each phase; none: nothing is."""

    phases: list[Literal["warm_start", "estep", "mstep", "ntp"]] = []
    """Phases whose steps are meant; none named: all."""

    ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Processes that are profiled."""

    tool: Literal["torch", "nsight"] = "torch"
    """`torch`: a Chrome trace of each step, of CPU and GPU; `nsight`: the steps and their parts are marked for an
    `nsys profile --capture-range=cudaProfilerApi` around the run (needs CUDA)."""

    memory: bool = False
    """Also the history of GPU memory in each step, with the lines of code (needs CUDA)."""
