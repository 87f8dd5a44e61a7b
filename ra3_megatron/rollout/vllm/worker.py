"""What vLLM's workers do for us beyond sampling: reach the logits processor, and take weights.

vLLM mixes the class into each of its workers, one a tensor-parallel rank; the server calls the methods by name.
"""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from ra3_megatron.rollout.vllm.logits import Choices, Stash
from ra3_megatron.rollout.vllm.manifest import expected_tensors
from ra3_megatron.rollout.vllm.messages import Manifest, WeightSource
from ra3_megatron.rollout.vllm.weights import WeightsRefused, load, recover

logger = logging.getLogger(__name__)


class WorkerExtension:
    """Methods of every worker; `model_runner` is the worker's own."""

    model_runner: Any

    def ra3_choices(self) -> Choices:
        """The worker's logits processor."""
        processors = self.model_runner.input_batch.logitsprocs.all
        return next(processor for processor in processors if isinstance(processor, Choices))

    def ra3_set_table(self, sets: npt.NDArray[np.bool_]) -> None:
        """The table of token sets, before the first request."""
        self.ra3_choices().set_table(sets)

    def ra3_take(self) -> Stash:
        """Results since the last call. Every rank has the same ones."""
        return self.ra3_choices().take()

    def ra3_manifest(self) -> Manifest:
        """The tensors that an update must bring."""
        return expected_tensors(self.model_runner.get_model())

    def ra3_update(self, source: WeightSource) -> str | None:
        """Load new weights; why that failed, if it did. The weights are garbage then."""
        try:
            load(source, self.ra3_manifest(), self.model_runner)
        except WeightsRefused as refusal:
            recover(self.model_runner)
            return str(refusal)
        except Exception as failure:
            logger.exception("the weights could not be loaded")
            recover(self.model_runner)
            return f"{type(failure).__name__}: {failure}"
        return None
