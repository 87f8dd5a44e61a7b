"""Sampling the latents of documents: rounds of `RolloutEngine.advance` until every line is decided.

`jump_ahead` asks for many lines at once: one teacher-forced pass decides every line up to the next thought, and all of
these decisions are exact, because up to there the text is the expert's. The number of rounds is the number
of thoughts, not of lines. `naive` asks for one line at a time. Both draw line t of a transcript from the same
uniforms, so they sample the same transcript; the law is that of q in method.md.

Transcripts have different numbers of thoughts: the places of those that are done are taken by those that wait, a whole
document's at a time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import numpy as np
import numpy.typing as npt

from ra3_megatron.mcore import watchdog
from ra3_megatron.rollout.protocol import LatentCompletion, LatentRequest, PlannedLine, RolloutEngine, Uniforms
from ra3_megatron.rollout.randomness import uniforms
from ra3_megatron.text.latents import Document, LatentFormat, Line, compose
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript

LOOK_AHEAD = 1.0
"""Lines asked for at once, in units of the mean distance between thoughts (the first request of a transcript asks for
all of them: the transcripts of one document share that pass). It changes the cost, never the outcome."""


@dataclass(frozen=True)
class Job:
    """One transcript to sample: a document, and the key of the random stream that decides it."""

    document: Document
    key: tuple[int, ...]
    decisions: npt.NDArray[np.bool_] | None = None
    """Whether to think at each line, whatever the policy prefers (where there is a choice at all), [lines]; None: as
    it decides. The thoughts are the policy's in either case."""


@dataclass
class _Row:
    """A transcript in the making."""

    number: int
    job: Job
    draws: Uniforms
    context: list[int]
    """What stands before the next line, latents included."""
    plain: list[int]
    """The same without any latent."""
    total: int
    """Tokens of the finished transcript if no further thought is taken."""
    line: int = 0
    thoughts: dict[int, list[int]] = field(default_factory=dict)
    offered: list[bool] = field(default_factory=list)
    decision_log_probs: dict[int, float] = field(default_factory=dict)
    thought_log_probs: dict[int, list[float]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.line >= len(self.job.document.lines)


class LatentSampler:
    """Samples transcripts with at most `max_tokens` tokens, `batch_size` of them at once."""

    def __init__(
        self,
        engine: RolloutEngine,
        latents: LatentFormat,
        tokenizer: Tokenizer,
        max_tokens: int,
        batch_size: int,
        method: Literal["jump_ahead", "naive"] = "jump_ahead",
        naive_cache: bool = True,
        keep_latents: bool = True,
    ) -> None:
        """keep_latents: whether earlier thoughts stay in the context (`text.keep_latents`)."""
        self.engine = engine
        self.latents = latents
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.method = method
        self.naive_cache = naive_cache
        self.keep_latents = keep_latents

    def sample(self, jobs: Sequence[Job]) -> list[Transcript]:
        """One transcript of each job, in order. Documents of like length are sampled together."""
        waiting = deque(sorted(range(len(jobs)), key=lambda i: (_length(jobs[i].document, self.latents), i)))
        transcripts: list[Transcript | None] = [None] * len(jobs)
        active: list[_Row] = []
        decided = thoughts = 0
        self.engine.forget()
        while True:
            active += [self._open(number, jobs[number]) for number in self._next(jobs, waiting, len(active))]
            if not active:
                break
            watchdog.touch()
            if self.method == "naive" and not self.naive_cache:
                self.engine.forget()
            window = max(1, round(LOOK_AHEAD * decided / thoughts)) if thoughts else None
            requests = [self._request(row, self._lines(row, window)) for row in active]
            for row, request, completion in zip(active, requests, self.engine.advance(requests), strict=True):
                before = row.line
                self._apply(row, request, completion)
                decided += row.line - before
                thoughts += completion.thought_line is not None
                if row.done:
                    transcripts[row.number] = self._transcript(row)
            active = [row for row in active if not row.done]
        self.engine.forget()
        return [t for t in transcripts if t is not None]

    def _next(self, jobs: Sequence[Job], waiting: deque[int], active: int) -> list[int]:
        """Jobs to begin with beside `active` others: those of one document together, which share its first pass, as
        long as they have places. Where nothing else is active every place is taken."""
        taken: list[int] = []
        while waiting and (free := self.batch_size - active - len(taken)) > 0:
            documents = (jobs[number].document for number in waiting)
            _, together = next(groupby(documents, key=id))
            group = len(list(together))
            if active and group > free:
                break
            taken += [waiting.popleft() for _ in range(min(group, free))]
        return taken

    def _lines(self, row: _Row, window: int | None) -> int:
        """How many to ask for. window: none: no thought has been taken yet."""
        if self.method == "naive":
            return 1
        left = len(row.job.document.lines) - row.line
        return left if window is None or not row.line else min(window, left)

    def _open(self, number: int, job: Job) -> _Row:
        lines = job.document.lines
        draws = uniforms(job.key, len(lines), self.latents.max_thought_ids)
        context = [self.tokenizer.bos, *job.document.prompt]
        return _Row(number, job, draws, context, list(context), _length(job.document, self.latents))

    def _request(self, row: _Row, window: int) -> LatentRequest:
        observed = row.job.document.observed
        stop = row.line + window
        if not self.keep_latents:  # a thought that stands there already changes the context: a request begins with it
            stop = min([stop, *(line for line in observed if line > row.line)])
        ahead = row.job.document.lines[row.line : stop]
        return LatentRequest(
            key=row.number,
            context=row.context if self.keep_latents or row.line not in observed else row.plain,
            lines=[self._plan(row, row.line + offset) for offset in range(len(ahead))],
            uniforms=row.draws[row.line : row.line + len(ahead)],
            last=row.line + len(ahead) == len(row.job.document.lines),
        )

    def _plan(self, row: _Row, number: int) -> PlannedLine:
        document, decisions = row.job.document, row.job.decisions
        line, observed = document.lines[number], document.observed.get(number)
        growth = self.latents.max_thought_ids + len(self.latents.forced_end) + len(line.indent)
        before = self.latents.before_decision(line)[0]
        if observed is not None:  # a human's thought stands there already: nothing to decide
            before += self._latent(observed, line)
            return PlannedLine(before, self.latents.action(line)[0], line.think_set, offered=False)
        return PlannedLine(
            before=before,
            act=self.latents.act(line)[0] + self.latents.action(line)[0],
            think_set=line.think_set,
            offered=line.may_think and row.total + growth <= self.max_tokens,
            think=None if decisions is None else bool(decisions[number]),
        )

    def _apply(self, row: _Row, request: LatentRequest, completion: LatentCompletion) -> None:
        decided = completion.decision_log_probs
        for planned, log_prob in zip(request.lines, decided, strict=False):
            if not self.keep_latents and row.line in row.job.document.observed:
                row.context = list(row.plain)
            row.context += [*planned.before, *planned.act]
            row.plain += self._without_latent(row.job.document.lines[row.line])
            row.offered.append(planned.offered)
            if planned.offered:
                row.decision_log_probs[row.line] = log_prob
            row.line += 1
        if completion.thought_line is None:
            return
        line = row.job.document.lines[row.line]
        thought = completion.thought
        latent = self._latent(thought, line)
        if not self.keep_latents:
            row.context = list(row.plain)
        row.plain += self._without_latent(line)
        row.context += [*self.latents.before_decision(line)[0], *latent, *self.latents.action(line)[0]]
        row.total += len(latent) - len(self.latents.act(line)[0])
        row.offered.append(True)
        row.thoughts[row.line] = thought
        row.thought_log_probs[row.line] = completion.thought_log_probs
        row.line += 1

    def _without_latent(self, line: Line) -> tuple[int, ...]:
        """The line as it stands in a document without thoughts."""
        return (*self.latents.before_decision(line)[0], *self.latents.act(line)[0], *self.latents.action(line)[0])

    def _latent(self, thought: Sequence[int], line: Line) -> tuple[int, ...]:
        """A thought with all that the format writes between the decision and the action."""
        end = () if self.latents.ends[thought[-1]] else self.latents.forced_end
        return (*thought, *end, *self.latents.after_thought(line)[0])

    def _transcript(self, row: _Row) -> Transcript:
        thoughts = {**row.job.document.observed, **row.thoughts}
        transcript = compose(row.job.document, thoughts, self.latents, self.tokenizer)
        log_probs = np.zeros(transcript.num_tokens, dtype=np.float32)
        for line, value in row.decision_log_probs.items():
            log_probs[transcript.decision_positions[line]] = value
        for line, values in row.thought_log_probs.items():
            start = transcript.decision_positions[line]
            log_probs[start : start + len(values)] = values
        return replace(
            transcript,
            offered=np.array(row.offered, dtype=bool),
            log_probs=log_probs,
            weight_version=self.engine.weight_version,
        )


def _length(document: Document, latents: LatentFormat) -> int:
    """Tokens of the document with its observed thoughts only."""
    total = 1 + len(document.prompt) + int(document.complete)
    for index, line in enumerate(document.lines):
        total += len(line.ids)
        thought = document.observed.get(index)
        if thought is None:
            total += len(latents.act(line)[0])
        else:
            end = 0 if latents.ends[thought[-1]] else len(latents.forced_end)
            total += len(thought) + end + len(latents.after_thought(line)[0])
    return total
