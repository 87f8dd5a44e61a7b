"""`ra3 show`: transcripts of a run, line by line, with decision, log-probability, reward and advantage.

The figures stand on the first row of a line: on its thought when it has one. Columns hold at 100 characters; code that
is longer goes on in the next row. Without a terminal the same text comes without colour.
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.run_folder import require_run
from ra3_megatron.report.terminal import THOUGHT_STYLE
from ra3_megatron.report.transcripts import LineRecord, TranscriptRecord, read_transcripts, transcript_files

WIDTH = 100
"""Columns without a terminal, and at most on one."""

_GUTTER = f"{'decision':<8} {'log q':>8} {'reward':>8} {'advant.':>8}  "
_MIN_CODE = 20


def show(
    run_dir: Path | str,
    phase: str | None = None,
    count: int = 3,
    document: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the first `count` transcripts of a run (those of one `document`, when it is named).

    They come from the newest transcript file, or from the newest one of `phase`
    (`estep`, or `estep-1` for its first iteration); with `document`,
    from the newest one that holds it.

    Raises:
        UserError: no run folder, no transcripts, or none that fits.
    """
    console = console or Console()
    chosen = _choose(Path(run_dir), phase, count, document)
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    for index, transcript in enumerate(chosen):
        if index:
            console.print()
        for row in _rows(transcript, width):
            console.print(row, no_wrap=True, soft_wrap=True, highlight=False)


def _choose(run_dir: Path, phase: str | None, count: int, document: str | None) -> list[TranscriptRecord]:
    if count < 1:
        raise UserError(f"count={count}: print at least 1 transcript")
    folder = require_run(run_dir)
    files = transcript_files(folder.path)
    if not files and folder.problems.is_file():
        raise UserError(f"{run_dir}: a run of ra3 rlvr has no transcripts: see responses/ and report.html there")
    if not files:
        raise UserError(f"{run_dir}: no transcripts yet; they are written by the E-step and by the evaluation")
    fitting = [path for path in files if phase is None or f"{path.stem}-".startswith(f"{phase}-")]
    if not fitting:
        names = ", ".join(path.stem for path in files[:8])
        raise UserError(f"phase={phase}: no transcripts of it in {run_dir}; there are {names}")
    for path in reversed(fitting):
        found = []
        for transcript in read_transcripts(path):
            if document is None or transcript.document == document:
                found.append(transcript)
            if len(found) == count:
                break
        if found:
            return found
    if document is None:
        raise UserError(f"{run_dir}: the transcript files hold no whole transcript")
    raise UserError(f"document={document}: no transcript of it in {run_dir}")


def _rows(transcript: TranscriptRecord, width: int) -> list[Text]:
    lines = transcript.lines
    thoughts = sum(line.thought is not None for line in lines)
    rewards = [line.reward for line in lines if line.reward is not None]
    facts = [
        f"iteration {transcript.iteration}",
        f"step {transcript.step}",
        f"rollout {transcript.rollout}",
        f"weights {transcript.weight_version}",
        f"{thoughts} thoughts in {len(lines)} lines",
    ]
    if rewards:
        facts.append(f"mean reward {sum(rewards) / len(rewards):+.3f}")
    rows = [Text(transcript.document, style="bold"), Text(" · ".join(facts), style="dim"), Text(_GUTTER, style="dim")]
    room = max(_MIN_CODE, width - len(_GUTTER))
    for line in lines:
        rows += _line_rows(line, room)
    for row in rows:
        row.rstrip()
    return rows


def _line_rows(line: LineRecord, room: int) -> list[Text]:
    gutter = _gutter(line)
    rows = []
    for text, style in _pieces(line):
        for start in range(0, max(1, len(text)), room):
            rows.append(Text.assemble(gutter, (text[start : start + room], style)))
            gutter = Text(" " * len(_GUTTER))
    return rows


def _pieces(line: LineRecord) -> list[tuple[str, str]]:
    """What is printed of a line, row by row, with its style: the thought (indented like its line), then the code."""
    code = [part.expandtabs(4) for part in (line.text.rstrip("\n") or line.text[:0]).split("\n")]
    indent = code[0][: len(code[0]) - len(code[0].lstrip())]
    thought = [] if line.thought is None else [indent + part.strip() for part in line.thought.strip().split("\n")]
    return [(part, THOUGHT_STYLE) for part in thought] + [(part, "") for part in code]


def _gutter(line: LineRecord) -> Text:
    if line.thought is not None:
        decision, style = "think", THOUGHT_STYLE
    elif line.offered:
        decision, style = "act", "cyan"
    else:
        decision, style = "·", "dim"
    log_prob = f"{line.log_prob:.3f}" if line.offered else ""
    return Text.assemble(
        (f"{decision:<8} ", style),
        f"{log_prob:>8} ",
        f"{_signed(line.reward):>8} ",
        (f"{_signed(line.advantage):>8}  ", _advantage_style(line.advantage)),
    )


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _advantage_style(advantage: float | None) -> str:
    if not advantage:
        return ""
    return "green" if advantage > 0 else "red"
