"""The EM loop: warm start, then E-step, infusion and M-step in turn, and NTP beside it as the control.

    pi_0   = warm start (next-token prediction)
    q_i    = E-step(start pi_{i-1}, scored by pi_{i-1})
    D_i    = documents infused with latents sampled by q_i
    pi_i   = M-step(start pi_{i-1}, on D_i)

NTP is the same loop with nothing between the lines: its M-steps read the same documents in the same order from the
same start (`mstep.start`: pi_{i-1}, the base, or q_i, which without thoughts is pi_{i-1}). Every step is a function of
(seed, phase, step) and the checkpoint before it.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.em.context import EMContext
from ra3_megatron.em.controls import control_latents
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.evaluation import evaluate
from ra3_megatron.em.infuse import InfusedCorpus, infuse, is_infused
from ra3_megatron.em.latent_context import InForceOnly
from ra3_megatron.em.monitors import check_mstep, check_pruning
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.order import DocumentOrder, Ordered, Stream, order_seed
from ra3_megatron.em.readable import SHOWN_DOCUMENTS, transcript_records
from ra3_megatron.em.rollouts import RolloutQueue
from ra3_megatron.em.steps import EStepSteps, PackedSteps
from ra3_megatron.mcore import checkpoint, watchdog
from ra3_megatron.mcore.offload import park
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.report.held_out import figures_file, lines_file, read_figures, read_held_out, write_held_out
from ra3_megatron.report.run_folder import write_json
from ra3_megatron.report.transcripts import write_transcripts
from ra3_megatron.text.latents import full_text
from ra3_megatron.training.identity import check_fit
from ra3_megatron.training.phases import Phase, final_of, finished, train_phase


class EM:
    """One run of the loop; `run()` does, or resumes, all of it."""

    def __init__(self, run: EMContext) -> None:
        self.run_context = run
        self.config = run.config
        self.train = run.corpus.store("mid", "train")
        self.valid = run.corpus.store("mid", "valid")
        self._length = self.config.model.context_length
        seed = order_seed(self.config.seed, Stream.MID_ORDER)
        self.order = DocumentOrder(self.train, self.config.mstep, self._length, seed)

    def run(self) -> None:
        """Everything that the configuration asks for. NTP goes first, so that RA3's monitors can compare with it."""
        self._check_policy()
        base = self.warm_start()
        self.evaluate("base", 0, base)
        if self.config.method == "ntp" or self.config.em.control:
            self.ntp(base)
        if self.config.method == "ra3":
            self.ra3(base)

    def ra3(self, base: Path) -> None:
        """Alternate E-step and M-step from the warm start."""
        pi, elbo = base, self.evaluate("base", 0, base)["elbo"]
        for iteration in range(1, self.config.em.iterations + 1):
            q = self.estep(iteration, pi)
            start = {"base": base, "pi": pi, "q": q}[self.config.mstep.start]
            pi = self.mstep(Phase("mstep", iteration), start, partial(self.infuse, iteration, q))
            before, elbo = elbo, self.evaluate("ra3", iteration, pi)["elbo"]
            if self.config.em.stop_without_gain and elbo <= before:
                self._say(f"iteration {iteration} did not raise the held-out ELBO: stopping (em.stop_without_gain)")
                break

    def ntp(self, base: Path) -> None:
        """The same M-steps on the same documents without latents."""
        pi = base
        for iteration in range(1, self.config.em.iterations + 1):
            start = base if self.config.mstep.start == "base" else pi
            pi = self.mstep(Phase("ntp", iteration), start, partial(self._documents, iteration))
            self.evaluate("ntp", iteration, pi)

    def _check_policy(self) -> None:
        """A policy that does not fit is refused before anything is trained."""
        if self.config.estep.policy is not None:
            tokenizer = self.run_context.corpus.tokenizer
            check_fit(Path(self.config.estep.policy), "estep.policy", self.config, tokenizer)

    # -- phases ---------------------------------------------------------------------------------------------------

    def warm_start(self) -> Path:
        """pi_0: next-token prediction on documents with their human comments."""
        run, settings = self.run_context, self.config.warm_start
        phase = Phase("warm_start", 0)
        if finished(run, phase):
            return final_of(run, phase)
        store = run.corpus.store("warm", "train")
        order = DocumentOrder(store, settings, self._length, order_seed(self.config.seed, Stream.WARM_ORDER))
        start = run.base
        if start is not None:
            name = "model.hf" if settings.checkpoint is None else "warm_start.checkpoint"
            check_fit(start, name, self.config, run.corpus.tokenizer)

        def steps(trainer: Trainer) -> PackedSteps:
            documents = self._as_read(Ordered(store, order.of(1)))
            return PackedSteps(MStep(self.config, settings, trainer, documents))

        return train_phase(run, phase, settings.steps, settings.optimizer, run.new_model(start is None), start, steps)

    def estep(self, iteration: int, pi: Path) -> Path:
        """q_i: policy gradient from pi_{i-1}, rewarded by pi_{i-1}."""
        run, settings = self.run_context, self.config.estep
        phase = Phase("estep", iteration)
        if math.isinf(settings.latent_price):
            self._say(f"{phase.key}: skipped, because with estep.latent_price=inf no thought is ever worth its price")
            return pi
        if settings.policy is not None:
            return Path(settings.policy)
        if finished(run, phase):
            return final_of(run, phase)
        scorer = run.new_model(drawn=False, trained=False)
        checkpoint.load(pi, scorer, run.runtime, verify=self.config.checkpoint.verify)
        scorer.requires_grad_(False)
        if self.config.parallel.offload_scorer:
            park(scorer, run.runtime.device)

        sampler = DocumentSampler(len(self.train), order_seed(self.config.seed, Stream.ESTEP_ORDER, iteration))
        key = (self.config.seed, Stream.ESTEP, iteration)

        def steps(trainer: Trainer) -> EStepSteps:
            policy = run.policy(trainer.model)
            queue = RolloutQueue(policy, self.train, sampler, key, self.config, trainer.clock)
            return EStepSteps(run, iteration, EStep(self.config, policy, trainer, scorer, run.blank), queue)

        return train_phase(
            run,
            phase,
            settings.steps,
            settings.optimizer,
            run.new_model(drawn=False),
            pi,
            steps,
            updates_per_step=settings.updates_per_rollout,
        )

    def infuse(self, iteration: int, q: Path) -> InfusedCorpus:
        """D_i: the documents of the next M-step with latents sampled by q_i; once more where they are gone."""
        run, phase = self.run_context, Phase("infuse", iteration)
        folder = run.folder.path / "infused" / f"iteration_{iteration}"
        logged = run.has_logged(phase.name, iteration)  # the last thing that an infusion does
        if logged and run.runtime.broadcast(run.runtime.is_main and is_infused(folder)):
            return InfusedCorpus(folder)
        self._stop_if_asked(f"before {phase.key}")
        documents = self._documents(iteration)
        model = run.new_model(drawn=False, trained=False)
        record = checkpoint.load(q, model, run.runtime, verify=self.config.checkpoint.verify)
        policy, how, longest = run.policy(model, record["weight_version"]), self.config.mstep.latents, self._length
        infused = 0

        def behind_chunk(done: int, tokens: int) -> None:
            nonlocal infused
            infused += done
            task.advance(done, units=tokens)
            self._stop_if_asked(f"saved {infused} of {len(documents)} documents of {phase.key}")

        with run.progress.task(phase.key, total=len(documents), unit="tokens") as task:
            corpus = infuse(
                policy,
                documents,
                (self.config.seed, Stream.INFUSE, iteration),
                folder,
                run.runtime,
                run.blank,
                behind_chunk,
                None if how == "sampled" else partial(control_latents, how, policy=policy, max_tokens=longest),
            )
        stats = corpus.record
        values = {"documents": len(corpus), "tokens": stats["tokens"], "think_rate": stats["thoughts"] / stats["lines"]}
        if stats["thoughts"]:
            values["mean_thought_tokens"] = stats["thought_tokens"] / stats["thoughts"]
        values |= {"seconds": stats["seconds"], "tokens_per_second": stats["tokens"] / stats["seconds"]}
        if not logged:
            run.log(phase.name, iteration, 1, values)
        return corpus

    def mstep(self, phase: Phase, start: Path, documents: Callable[[], Any]) -> Path:
        """pi_i: next-token prediction on these documents, which nothing asks for when it is done."""
        run, settings = self.run_context, self.config.mstep
        if finished(run, phase):
            return final_of(run, phase)
        found = documents()

        def steps(trainer: Trainer) -> PackedSteps:
            read = self._as_read(found)
            return PackedSteps(MStep(self.config, settings, trainer, read, settings.thought_weight))

        return train_phase(run, phase, settings.steps, settings.optimizer, run.new_model(drawn=False), start, steps)

    def evaluate(self, arm: str, iteration: int, model_of: Path) -> dict[str, Any]:
        """Held-out figures of a checkpoint, once; later calls read them."""
        run = self.run_context
        path = figures_file(run.folder.path, arm, iteration)
        if run.runtime.broadcast(run.runtime.is_main and path.is_file()):
            return self._read(arm, iteration)
        self._stop_if_asked(f"before the evaluation of {arm} {iteration}")
        model = run.new_model(drawn=False, trained=False)
        record = checkpoint.load(model_of, model, run.runtime, verify=self.config.checkpoint.verify)
        count = min(self.config.evaluation.documents, len(self.valid))
        documents = [self.valid[index] for index in range(count)]
        keys = [(self.config.seed, Stream.EVALUATION, index) for index in range(count)]
        task = run.progress.task(f"evaluating {arm} {iteration}" if iteration else f"evaluating {arm}", total=1)
        policy = run.policy(model, record["weight_version"])
        watchdog.beat(f"the evaluation of {arm} {iteration} began")
        result = evaluate(model, policy, documents, keys, self.config, run.blank)
        watchdog.rest()
        task.advance(1)
        figures = dict(result.figures)
        require_finite(figures, model_of)
        run.rewind("evaluation", iteration, -1, arm=arm)
        run.log("evaluation", iteration, 0, {"arm": arm, **figures})
        if run.runtime.is_main:
            texts = [full_text(t, run.corpus.tokenizer) for t in result.transcripts]
            thinking = sorted(range(len(texts)), key=lambda i: (not result.transcripts[i].think.any(), i))
            snippets = [texts[i] for i in thinking[: self.config.evaluation.snippets]]
            records = transcript_records(
                result.transcripts[: 4 * SHOWN_DOCUMENTS],
                run.corpus,
                iteration,
                0,
                self.config.evaluation.samples,
                result.log_likelihoods,
                result.rewards,
                None,
            )
            write_transcripts(run.folder.path, f"evaluation-{arm}-{iteration}", records)
            write_held_out(lines_file(run.folder.path, arm, iteration), result.by_line(run.corpus.tokenizer))
            if arm == "ra3":
                self._check(iteration, figures)
            if arm == self.config.method:
                self._check_pruning(arm, iteration)
            write_json(path, {"arm": arm, "iteration": iteration, **figures, "snippets": snippets})
        run.runtime.barrier()
        return self._read(arm, iteration)

    def _check(self, iteration: int, figures: dict[str, Any]) -> None:
        before = self._figures("ra3", iteration - 1) or self._figures("base", 0)
        control = self._figures("ntp", iteration)
        assert before is not None
        alarms = check_mstep(
            figures["code_ce"],
            before["code_ce"],
            figures["raw_code_ce"],
            before["raw_code_ce"],
            None if control is None else control["raw_code_ce"],
            self.config.monitors,
        )
        self.run_context.alarm("evaluation", iteration, 0, alarms)

    def _check_pruning(self, arm: str, iteration: int) -> None:
        folder = self.run_context.folder.path
        base = [line.raw_nll for d in read_held_out(lines_file(folder, "base", 0)) for line in d.lines]
        now = [line.nll for d in read_held_out(lines_file(folder, arm, iteration)) for line in d.lines]
        self.run_context.alarm("evaluation", iteration, 0, check_pruning(base, now, self.config.monitors))

    def _figures(self, arm: str, iteration: int) -> dict[str, Any] | None:
        return read_figures(self.run_context.folder.path, arm, iteration)

    def _read(self, arm: str, iteration: int) -> dict[str, Any]:
        """The figures of an evaluation that has been, as the main process reads them. Collective."""
        figures = self.run_context.runtime.on_main(lambda: self._figures(arm, iteration))
        assert figures is not None
        return figures

    def _documents(self, iteration: int) -> Ordered:
        """The documents that iteration's M-step reads, in order, without latents."""
        return Ordered(self.train, self.order.of(iteration))

    def _as_read(self, documents: Any) -> Any:
        """The documents as the sequences that the model trains on."""
        if self.config.text.keep_latents:
            return documents
        corpus = self.run_context.corpus
        return InForceOnly(documents, corpus.format, corpus.tokenizer)

    def _stop_if_asked(self, where: str) -> None:
        """Behind a phase that is saved: nothing is lost."""
        signal = self.run_context.stop.agreed(self.run_context.runtime)
        if signal is not None:
            self.run_context.stopped(signal, where)

    def _say(self, text: str) -> None:
        self.run_context.progress.message(text)


def require_finite(figures: dict[str, float | None], model_of: Path) -> None:
    """UserError when a held-out figure of this checkpoint is NaN or infinite."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"held-out {name} of {model_of} is {value}: training has diverged; lower the learning rate of its phase"
            )
