"""The summary of a run, from what its phases left in the run folder."""

from typing import Any, Literal

from ra3_megatron.em.context import EMContext
from ra3_megatron.em.flops import SAMPLED, SCORED, TRAINED, flops
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.report import summary as schema
from ra3_megatron.report.held_out import read_figures
from ra3_megatron.report.metrics import read_metrics
from ra3_megatron.training.phases import Phase, final_of, is_done

MEASURES = (
    "code_ce",
    "raw_code_ce",
    "code_accuracy",
    "raw_code_accuracy",
    "thought_ce",
    "think_rate",
    "mean_thought_tokens",
    "reward",
    "elbo",
)


def summarize(run: EMContext) -> schema.Summary:
    """Everything that the summary holds. The warm start must be done."""
    records = read_metrics(run.folder.path)
    warm = _cost(run, Phase("warm_start", 0))
    base_figures = _evaluation(run, "base", 0)
    assert base_figures is not None
    iterations = []
    phases = _phases(run, records)
    measured: dict[tuple[str, int], schema.Arm] = {}
    arms: tuple[Literal["ntp", "ra3"], ...] = ("ntp", "ra3")
    for arm in arms:
        spent = schema.Phase(seconds=0.0, tokens=0)
        total = 0.0
        for iteration in range(1, run.config.em.iterations + 1):
            phase = Phase("mstep" if arm == "ra3" else "ntp", iteration)
            figures = _evaluation(run, arm, iteration)
            if figures is None or not is_done(run, phase):
                break
            cost = _cost(run, phase)
            if run.config.mstep.start == "base":  # these weights have seen this M-step alone
                spent = schema.Phase(seconds=0.0, tokens=0)
            spent = schema.Phase(seconds=spent.seconds + cost.seconds, tokens=spent.tokens + cost.tokens)
            estep = _estep(run, iteration, records) if arm == "ra3" else None
            before = ("estep", "infuse") if arm == "ra3" else ()
            keys = [phase.key, *(Phase(name, iteration).key for name in before)]
            total += sum(phases[key].seconds for key in keys if key in phases)
            measured[arm, iteration] = _arm(figures, spent, total)
            iterations.append(
                schema.Iteration(**measured[arm, iteration].__dict__, iteration=iteration, arm=arm, estep=estep)
            )
    # the last iteration of the method: RA3 may have stopped early, and then the control is compared at that point
    last = max((i.iteration for i in iterations if i.arm == run.config.method), default=0)
    shown = _evaluation(run, run.config.method, last) if last else base_figures
    assert shown is not None
    assert run.config.method != "rlvr"  # that has no EM loop
    return schema.Summary(
        method=run.config.method,
        base=_arm(base_figures, warm, warm.seconds),
        ntp=measured.get(("ntp", last)),
        ra3=measured.get(("ra3", last)),
        iterations=iterations,
        phases=phases,
        data=_data(run),
        monitors=[
            schema.Monitor(
                name=r["monitor"], message=r["message"], advice=r["advice"], phase=r["phase"], iteration=r["iteration"]
            )
            for r in records
            if "monitor" in r
        ],
        snippets=shown["snippets"],
    )


def _arm(figures: dict[str, Any], cost: schema.Phase, total_seconds: float) -> schema.Arm:
    rate = cost.tokens / cost.seconds if cost.tokens else None
    measured = {name: figures[name] for name in MEASURES}
    return schema.Arm(
        **measured,
        tokens=cost.tokens,
        seconds=cost.seconds,
        tokens_per_second=rate,
        total_seconds=total_seconds,
    )


def _evaluation(run: EMContext, arm: str, iteration: int) -> dict[str, Any] | None:
    return read_figures(run.folder.path, arm, iteration)


def _cost(run: EMContext, phase: Phase) -> schema.Phase:
    record = read_record(final_of(run, phase))
    seconds, tokens = record["seconds"], record["tokens"]
    documents = run.config.estep.documents_per_step * record["step"] if phase.name == "estep" else None
    return schema.Phase(
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens else None,
        documents_per_second=documents / seconds if documents else None,
        flops=_flops(run, phase, tokens),
    )


def _flops(run: EMContext, phase: Phase, tokens: int) -> float:
    passes = {"estep": SAMPLED + SCORED + TRAINED * run.config.estep.updates_per_rollout, "infuse": SAMPLED}
    return flops(run.config.model, run.corpus.tokenizer.vocab_size, tokens, passes.get(phase.name, TRAINED))


def _phases(run: EMContext, records: list[dict[str, Any]]) -> dict[str, schema.Phase]:
    infused = {r["iteration"]: r for r in records if r["phase"] == "infuse"}
    found: dict[str, schema.Phase] = {"warm_start": _cost(run, Phase("warm_start", 0))}
    for iteration in range(1, run.config.em.iterations + 1):
        for name in ("estep", "infuse", "mstep", "ntp"):
            phase = Phase(name, iteration)
            if name == "infuse" and iteration in infused:
                record = infused[iteration]
                found[phase.key] = schema.Phase(
                    seconds=record["seconds"],
                    tokens=record["tokens"],
                    tokens_per_second=record["tokens"] / record["seconds"],
                    documents_per_second=record["documents"] / record["seconds"],
                    flops=_flops(run, phase, record["tokens"]),
                )
            elif name != "infuse" and is_done(run, phase):
                found[phase.key] = _cost(run, phase)
    return found


def _estep(run: EMContext, iteration: int, records: list[dict[str, Any]]) -> schema.EStep | None:
    mine = [r for r in records if r["phase"] == "estep" and r["iteration"] == iteration and "reward" in r]
    if not mine:
        return None
    first, last = mine[0], mine[-1]
    cost = _cost(run, Phase("estep", iteration))
    return schema.EStep(
        reward_first=first["reward"],
        reward_last=last["reward"],
        think_rate_first=first["think_rate"],
        think_rate=last["think_rate"],
        mean_thought_tokens=last.get("mean_thought_tokens"),
        entropy=last["decision_entropy"],
        log_prob_mismatch=last["log_prob_mismatch"],
        steps=run.config.estep.steps,
        seconds=cost.seconds,
        documents_per_second=cost.documents_per_second,
    )


def _data(run: EMContext) -> dict[str, schema.Scalar]:
    manifest = run.corpus.manifest
    values: dict[str, schema.Scalar] = {"vocab_size": run.corpus.tokenizer.vocab_size}
    for name, counts in manifest.stores.items():
        label = name.replace("/", "_")
        values[f"{label}_documents"] = counts.documents
        values[f"{label}_tokens"] = counts.tokens
        values[f"{label}_cut_at_context"] = counts.too_long_cut
        values[f"{label}_dropped_at_context"] = counts.too_long_dropped
    for key, value in vars(manifest.counts).items():
        if isinstance(value, int):
            values[f"sources_{key}"] = value
    return values
