"""Rewards: one forward pass of the frozen model over finished transcripts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.em import objective
from ra3_megatron.em.latent_context import Contexts, whole
from ra3_megatron.em.packing import scoring_batches
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import Plan, RowWriter


@dataclass(frozen=True)
class TokenScores:
    """What the model makes of each token of a transcript; 0 where a token is not scored."""

    log_probs: npt.NDArray[np.float32]
    """log pi, [tokens]."""
    margins: npt.NDArray[np.float32]
    """log pi less that of the likeliest token, [tokens]."""

    @property
    def greedy(self) -> npt.NDArray[np.bool_]:
        """Whether greedy decoding would write each token (True where it is not scored), [tokens]."""
        found: npt.NDArray[np.bool_] = self.margins == 0
        return found


def token_scores(
    model: torch.nn.Module,
    transcripts: Sequence[Transcript],
    plan: Plan,
    runtime: Runtime,
    latents: LatentFormat,
    everything: bool = False,
    contexts: Contexts | None = None,
) -> list[TokenScores]:
    """Scores of each scored token (everything: of all tokens) of each transcript; the same on every process.

    contexts: the sequences as which the transcripts are read, which `plan` places; None: one each.
    """
    contexts = contexts or whole(transcripts)
    batches = scoring_batches(transcripts, plan, runtime, latents, everything, contexts)
    found: dict[int, TokenScores] = {}
    for rows, out in zip(plan.mine(runtime), forward(model, batches, runtime), strict=True):
        writer = RowWriter(plan, rows, contexts.sequences)
        log_probs, margins = writer.collect(out[1]), writer.collect(out[3])
        found |= {i: TokenScores(log_probs[i], margins[i]) for i in log_probs}
    for part in runtime.gather_data(found):
        found |= part
    scores = [found[i] for i in range(len(contexts.sequences))]
    log_probs_of = contexts.join([s.log_probs for s in scores])
    margins_of = contexts.join([s.margins for s in scores])
    return [TokenScores(*of) for of in zip(log_probs_of, margins_of, strict=True)]


def token_log_probs(
    model: torch.nn.Module,
    transcripts: Sequence[Transcript],
    plan: Plan,
    runtime: Runtime,
    latents: LatentFormat,
    everything: bool = False,
    contexts: Contexts | None = None,
) -> list[npt.NDArray[np.float32]]:
    """log pi of each scored token of each transcript, [tokens], 0 elsewhere; the same on every process."""
    scores = token_scores(model, transcripts, plan, runtime, latents, everything, contexts)
    return [s.log_probs for s in scores]


def line_log_likelihoods(
    transcript: Transcript, log_probs: npt.NDArray[np.float32], likelihood: objective.Likelihood
) -> npt.NDArray[np.float32]:
    """log pi(a_t | s_t, z_t) of each line, [lines], from its token log-probabilities, [tokens]."""
    scored = np.flatnonzero(transcript.roles == Role.EXPERT)
    values: npt.NDArray[np.float32] = objective.line_log_likelihood(
        torch.from_numpy(log_probs[scored]),
        torch.from_numpy(transcript.lines[scored].astype(np.int64)),
        transcript.num_lines,
        likelihood,
    ).numpy()
    return values


def malformed_thoughts(transcript: Transcript, empty_tokens: frozenset[int]) -> npt.NDArray[np.bool_]:
    """Lines whose thought says nothing (only `empty_tokens`) or was cut at its greatest length, [lines]."""
    bad = np.zeros(transcript.num_lines, dtype=bool)
    for line in np.flatnonzero(transcript.think):
        thought = transcript.thought_slice(int(line))
        cut = thought.stop < transcript.num_tokens and _is_cut(transcript, thought.stop, int(line))
        bad[line] = cut or all(int(token) in empty_tokens for token in transcript.ids[thought])
    return bad


def _is_cut(transcript: Transcript, after: int, line: int) -> bool:
    """Whether a forced end stands right behind the thought (before the repeated indentation)."""
    indent = np.count_nonzero(
        (transcript.lines == line) & (transcript.roles == Role.LAYOUT) & (np.arange(transcript.num_tokens) < after)
    )
    forced = np.count_nonzero((transcript.lines == line) & (transcript.roles == Role.FORCED))
    return bool(forced > indent)
