"""Transcripts as text with their figures, for `ra3 show` and the report."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ra3_megatron.corpus.build import Corpus
from ra3_megatron.report.transcripts import LineRecord, TranscriptRecord
from ra3_megatron.text.transcript import Transcript

SHOWN_DOCUMENTS = 4
"""Documents whose whole group is kept, of the last update of each E-step."""

Lines = Sequence[npt.NDArray[np.float32]]


def transcript_records(
    transcripts: Sequence[Transcript],
    corpus: Corpus,
    iteration: int,
    step: int,
    group: int,
    log_likelihoods: Lines | None,
    rewards: Lines | None,
    advantages: Lines | None,
) -> list[TranscriptRecord]:
    """Records of sampled transcripts that come in groups; figures [lines] of each, None: not known."""
    records = []
    for number, transcript in enumerate(transcripts):
        lines = []
        for line in range(transcript.num_lines):
            here = transcript.lines == line
            text = corpus.tokenizer.decode(transcript.ids[here & transcript.is_code].tolist())
            thought = corpus.tokenizer.decode(transcript.ids[transcript.thought_slice(line)].tolist()).strip()
            chosen = here if transcript.log_probs is not None else np.zeros_like(here)
            lines.append(
                LineRecord(
                    text=text,
                    thought=thought if transcript.think[line] else None,
                    offered=bool(transcript.offered[line]),
                    log_prob=0.0 if transcript.log_probs is None else float(transcript.log_probs[chosen].sum()),
                    log_likelihood=_value(log_likelihoods, number, line),
                    reward=_value(rewards, number, line),
                    advantage=_value(advantages, number, line),
                )
            )
        records.append(
            TranscriptRecord(
                document=transcript.document,
                iteration=iteration,
                step=step,
                rollout=number % group,
                weight_version=transcript.weight_version,
                lines=lines,
            )
        )
    return records


def _value(values: Lines | None, number: int, line: int) -> float | None:
    if values is None or not np.isfinite(values[number][line]):
        return None
    return float(values[number][line])
