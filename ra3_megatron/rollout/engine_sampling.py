"""Sampling through engine processes: transcripts from their owners to everybody, failures too.

Engines are refitted by `publish`. With `background`, a thread of their owner talks to them while training goes on; it
uses no process group, so nothing is exchanged before the batch is waited for.
"""

import threading
from collections.abc import Mapping, Sequence

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.refit import Refit
from ra3_megatron.rollout.refit.sending import Update
from ra3_megatron.rollout.sampling import ByDocument, Wait, sample_groups
from ra3_megatron.rollout.vllm.process import EngineError


class EngineSampling:
    """`Sampling` through the engines of all processes. One model at a time."""

    def __init__(
        self,
        runtime: Runtime,
        refit: Refit,
        updates: Sequence[Update],
        sampler: LatentSampler | None,
        shares: tuple[int, int],
    ) -> None:
        """refit: of the model. updates, sampler: of this process's engines, if it has any. shares: which share of the
        documents those sample, of how many."""
        self._runtime, self._refit, self._updates = runtime, refit, updates
        self._sampler, self._shares = sampler, shares
        self._version = 0

    @property
    def weight_version(self) -> int:
        return self._version

    def publish(self, version: int) -> dict[str, float]:
        try:
            stats = self._refit.send(self._updates, version)
        except RefitError as error:
            raise Unavailable(f"rollout.engine=vllm: {error}") from error
        self._version = version
        return {"refit_seconds": stats.seconds, "refit_bytes_per_second": stats.nbytes / stats.seconds}

    def mine(self, documents: int) -> Sequence[int]:
        first, step = self._shares
        return range(first, documents, step) if self._sampler is not None else []

    def start(self, jobs: Mapping[int, list[Job]], background: bool = False) -> Wait:
        result = _Result(self._sampler, jobs)
        thread = threading.Thread(target=result.run, name="rollouts", daemon=True) if background else None
        if thread is None:
            result.run()
        else:
            thread.start()

        def wait() -> ByDocument:
            if thread is not None:
                thread.join()
            if result.defect is not None:
                raise result.defect
            raise_anywhere(result.failure, self._runtime)
            everything: ByDocument = {}
            for share in self._runtime.gather_all(result.transcripts):
                everything |= share
            return everything

        return wait


class _Result:
    """What a batch comes to."""

    def __init__(self, sampler: LatentSampler | None, jobs: Mapping[int, list[Job]]) -> None:
        self._sampler, self._jobs = sampler, jobs
        self.transcripts: ByDocument = {}
        self.failure = ""
        self.defect: Exception | None = None
        """What should not have happened."""

    def run(self) -> None:
        if self._sampler is None or not self._jobs:
            return
        try:
            self.transcripts = sample_groups(self._sampler, self._jobs)
        except EngineError as error:
            self.failure = str(error)
        except Exception as error:  # a thread would lose it
            self.defect = error


def raise_anywhere(failure: str, runtime: Runtime, mistake: bool = False) -> None:
    """Unavailable on every process when there is a failure on any; UserError when one of them is a mistake of the user,
    which no retry mends. Collective."""
    failures = {told: None for told in runtime.gather_all((failure, mistake)) if told[0]}
    if failures:
        kind = UserError if any(mistake for _, mistake in failures) else Unavailable
        raise kind(f"rollout.engine=vllm: {'; '.join(why for why, _ in failures)}")
