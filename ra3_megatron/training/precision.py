"""In which precision the layers of a model really computed, and with whose kernels: `precision.json`, for the report.

Asked for is not computed: FP8 can be switched off by a wrong specification of the layers, a context that is not
entered, a version. So what the layers say of themselves is read behind the first and the last update of each phase, and
a run whose layers did not compute as asked ends there.
"""

import json
from collections import defaultdict
from typing import Any

from ra3_megatron.mcore.fp8 import computed, require_computed
from ra3_megatron.mcore.kernels import kernels_of
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.report.run_folder import read_json, write_json
from ra3_megatron.training.context import RunContext


def record_precision(run: RunContext, phase: str, trainer: Trainer) -> None:
    """Write what the layers computed in, behind an update of `phase`. Collective.

    Raises RuntimeError when a layer of an FP8 model computed in another precision than asked for.
    """
    asked = run.config.model
    mine = computed(chunks_of(trainer.model))
    require_computed(asked, mine)
    found: dict[str, str] = {}
    for part in run.runtime.gather_all(mine):
        found |= part
    if not run.runtime.is_main:
        return
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for name, precision in sorted(found.items(), key=lambda item: (int(item[0].split(".")[0]), item[0])):
        layers[precision].append(name)
    path = run.folder.precision
    before: dict[str, Any] = read_json(path)["phases"] if path.is_file() else {}
    if asked.fp8_recipe is not None and before.get(phase) != dict(layers):
        counts = ", ".join(f"{len(names)} in {precision}" for precision, names in layers.items())
        run.progress.message(f"{phase}: products with weights of {asked.num_layers} layers: {counts}")
    phases = {**before, phase: dict(layers)}
    content = {"asked": asked.precision, **_fp8_keys(run), "kernels": kernels_of(trainer), "phases": phases}
    if not path.is_file() or json.dumps(read_json(path)) != json.dumps(content):
        write_json(path, content)


def _fp8_keys(run: RunContext) -> dict[str, Any]:
    model = run.config.model
    return {} if model.fp8_recipe is None else {"fp8": model.fp8.model_dump()}
