"""What the phases do at each step, with the position in the data that a checkpoint keeps."""

from collections.abc import Sequence
from typing import Any

from ra3_megatron.em.context import EMContext
from ra3_megatron.em.estep import EStep, Rollouts
from ra3_megatron.em.monitors import check_estep
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.readable import SHOWN_DOCUMENTS, transcript_records
from ra3_megatron.em.rollouts import RolloutQueue
from ra3_megatron.report.transcripts import write_transcripts
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.training.agreement import require_agreement


class PackedSteps:
    """Steps of warm start, M-step and NTP for `train_phase`."""

    def __init__(self, mstep: MStep) -> None:
        self.mstep = mstep

    def step(self, step: int) -> dict[str, float]:
        return self.mstep.step()

    def sampling(self, step: int) -> None:
        """Nothing samples in these phases."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.mstep.batcher.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mstep.batcher.load_state_dict(state)  # type: ignore[arg-type]

    def describe_batch(self) -> Sequence[str]:
        return self.mstep.last_documents


class EStepSteps:
    """Steps of the E-step for `train_phase`."""

    def __init__(self, run: EMContext, iteration: int, estep: EStep, queue: RolloutQueue) -> None:
        self.run, self.iteration, self.estep, self.queue = run, iteration, estep, queue
        self.last: list[str] = []

    def step(self, step: int) -> dict[str, float]:
        settings = self.run.config.estep
        clock = self.estep.trainer.clock
        with clock.part("optimizer"):
            self.estep.trainer.synchronize()  # what samples reads the weights of the last update
        with clock.part("sampling"):
            transcripts, sampling = self.queue.next(step)
        self.last = [t.document for t in transcripts[:: settings.group_size]]
        metrics, rollouts = self.estep.update(transcripts)
        metrics |= sampling
        require_agreement("estep", f"estep-{self.iteration} step {step + 1}", metrics, self.run.config)
        if step + 1 == settings.steps:
            self._finish(step + 1, metrics, rollouts)
        return metrics

    def _finish(self, step: int, metrics: dict[str, float], rollouts: Rollouts) -> None:
        run, group = self.run, self.run.config.estep.group_size
        run.alarm("estep", self.iteration, step, check_estep(metrics, run.config.monitors))
        if run.runtime.is_main:
            records = transcript_records(
                rollouts.transcripts[: SHOWN_DOCUMENTS * group],
                run.corpus,
                self.iteration,
                step,
                group,
                rollouts.log_likelihoods,
                rollouts.rewards,
                rollouts.advantages,
            )
            write_transcripts(run.folder.path, f"estep-{self.iteration}-{step:04d}", records)

    def sampling(self, step: int) -> Sampling:
        self.queue.settle(step)
        return self.queue.sampling

    def state_dict(self) -> dict[str, Any]:
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue.load_state_dict(state)

    def describe_batch(self) -> Sequence[str]:
        return self.last
