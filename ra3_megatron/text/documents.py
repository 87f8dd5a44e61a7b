"""Documents: text ⇄ tokenized lines ⇄ transcripts.

A transcript of a document is: bos and the prompt, if there is one (CONTEXT); for every line its latent and its action,
as the format writes them; eos (LAYOUT, of the last line), unless the document was cut. The prompt and every line (or
statement) are encoded by themselves, so a token boundary stands at every line boundary. Invariant:
`code_text(compose(document, any thoughts))` is the document's text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ra3_megatron.config.data import HumanComments, TextConfig
from ra3_megatron.text.formats import SPACE_BYTES, LatentFormat, Line, Written
from ra3_megatron.text.segment import (
    WHITESPACE,
    comment_rows,
    drop_leading_blank_lines,
    segment,
    split_rows,
    strip_comment_lines,
)
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript


@dataclass(frozen=True)
class Document:
    """A tokenized document, without latents of its own."""

    name: str
    """Identifier."""
    lines: tuple[Line, ...]
    """Its primitive actions; at least one."""
    observed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Thoughts that a human wrote (`human_comments=as_thoughts`): line index -> ids, as `compose` takes them."""
    complete: bool = True
    """Ends with eos; False when it was cut."""
    prompt: tuple[int, ...] = ()
    """What stands before the first line: it is conditioned on, never scored, sampled or trained on."""


def encode_document(
    code: str,
    name: str,
    tokenizer: Tokenizer,
    format: LatentFormat,
    config: TextConfig,
    human_comments: HumanComments = "strip",
    prompt: str = "",
) -> Document:
    """Cut `code` into primitive actions and tokenize each; `prompt` stands before it, unchanged.

    Full-line comments are kept as lines, stripped, or, `as_thoughts`, made the observed thought of the line below them
    (several are joined; one that no line follows is dropped). Raises ValueError when no visible text is left.
    """
    thoughts: dict[int, str] = {}
    if human_comments == "as_thoughts":
        thoughts = _comments_above(code)
    text = code if human_comments == "keep" else strip_comment_lines(code)
    if not text.strip(WHITESPACE):
        raise ValueError(f"document {name}: no visible text")
    before = tuple(tokenizer.encode(prompt))
    lines: list[Line] = []
    observed: dict[int, tuple[int, ...]] = {}
    row = 0
    for part in segment(text, "statement" if config.granularity == "statement" else "line"):
        ids = tokenizer.encode(part)
        spans = config.granularity == "token"
        actions = _spans(ids, config.token_span, format) if spans else [_line(ids, format, tokenizer)]
        if row in thoughts:
            indentation = part[: len(part) - len(part.lstrip(WHITESPACE))]
            thought = format.thought(thoughts[row], actions[0], indentation, tokenizer)
            if thought:
                observed[len(lines)] = thought
        lines += actions
        row += len(split_rows(part))
    return Document(name, tuple(lines), observed, prompt=before)


def raw(document: Document, format: LatentFormat, tokenizer: Tokenizer) -> Transcript:
    """The transcript without thoughts."""
    return compose(document, {}, format, tokenizer)


def compose(
    document: Document, thoughts: Mapping[int, Sequence[int]], format: LatentFormat, tokenizer: Tokenizer
) -> Transcript:
    """The transcript in which line t has the thought `thoughts[t]`.

    `thoughts`: line index -> ids as sampled, the deciding first one included (`comment`: a token of the line's
    `think_set`; `tokens`: `<think>`). A thought that did not reach its end gets `forced_end`, role FORCED. The end of
    the document follows the last line. Raises ValueError when a thought could not have been sampled there.
    """
    unknown = [index for index in thoughts if not 0 <= index < len(document.lines)]
    if unknown:
        raise ValueError(f"document {document.name}: there is no line {unknown[0]} to think about")
    ids: list[int] = [tokenizer.bos, *document.prompt]
    roles: list[int] = [Role.CONTEXT] * len(ids)
    context = len(ids)
    counts: list[int] = []
    for index, line in enumerate(document.lines):
        before = len(ids)
        for part_ids, part_roles in _parts(line, thoughts.get(index), format):
            ids.extend(part_ids)
            roles.extend(part_roles)
        counts.append(len(ids) - before)
    if document.complete:
        ids.append(tokenizer.eos)
        roles.append(Role.LAYOUT)
        counts[-1] += 1
    return Transcript(
        ids=np.array(ids, dtype=np.int32),
        roles=np.array(roles, dtype=np.uint8),
        lines=np.repeat(np.arange(-1, len(counts), dtype=np.int32), [context, *counts]),
        offered=np.array([line.may_think for line in document.lines], dtype=bool),
        document=document.name,
    )


def cut(document: Document, max_tokens: int, format: LatentFormat) -> Document | None:
    """The longest start of `document`, in whole lines, whose raw transcript has at most `max_tokens` tokens.

    None when not even its first line fits. A document that had to be cut has no eos, so that a model does not learn
    to stop there.
    """
    used = 1 + len(document.prompt)
    for index, line in enumerate(document.lines):
        used += sum(len(part_ids) for part_ids, _ in _parts(line, None, format))
        last = index == len(document.lines) - 1
        if used + (last and document.complete) > max_tokens:
            if index == 0:
                return None
            observed = {row: ids for row, ids in document.observed.items() if row < index}
            return replace(document, lines=document.lines[:index], observed=observed, complete=False)
    return document


def code_text(transcript: Transcript, tokenizer: Tokenizer) -> str:
    """Text of the prompt and the expert's tokens only: the document as it was."""
    return tokenizer.decode(transcript.ids[transcript.is_given | transcript.is_code].tolist())


def full_text(transcript: Transcript, tokenizer: Tokenizer) -> str:
    """Text of all tokens, thoughts included; the markers of the `tokens` format by their names."""
    return marked_text(transcript.ids.tolist(), tokenizer)


def marked_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of these tokens; the markers of the `tokens` format by their names."""
    names = {index: name.encode() for name, index in tokenizer.special.items()}
    table = tokenizer.token_bytes
    return b"".join(names.get(index, table[index]) for index in ids).decode("utf-8", "replace")


def _parts(line: Line, thought: Sequence[int] | None, format: LatentFormat) -> list[Written]:
    if thought is None:
        return [format.before_decision(line), format.act(line), format.action(line)]
    format.check_thought(thought, line)
    end = () if format.ends_thought(thought[-1]) else format.forced_end
    return [
        format.before_decision(line),
        (tuple(thought), (format.first_role,) + (Role.THOUGHT,) * (len(thought) - 1)),
        (end, (Role.FORCED,) * len(end)),
        format.after_thought(line),
        format.action(line),
    ]


def _line(ids: Sequence[int], format: LatentFormat, tokenizer: Tokenizer) -> Line:
    table = tokenizer.token_bytes
    visible = [position for position, index in enumerate(ids) if table[index].strip(SPACE_BYTES)]
    first, end = visible[0], visible[-1] + 1
    body = tuple(ids[first:end])
    think_set = format.think_set_of(body)
    return Line(tuple(ids[:first]), body, tuple(ids[end:]), think_set, think_set != format.ALL)


def _spans(ids: Sequence[int], length: int, format: LatentFormat) -> list[Line]:
    """A line in pieces of `length` tokens, the last one shorter."""
    bodies = [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
    sets = [format.think_set_of(body) for body in bodies]
    return [Line((), body, (), row, row != format.ALL) for body, row in zip(bodies, sets, strict=True)]


def _comments_above(code: str) -> dict[int, str]:
    """Comments directly above a line, joined by a space: row of that line in the text without comments -> text."""
    comments = set(comment_rows(code))
    above: dict[int, str] = {}
    pending: list[str] = []
    kept: list[str] = []
    for row, text in enumerate(split_rows(code)):
        if row in comments:
            pending.append(text.strip(WHITESPACE).lstrip("#").strip())
            continue
        joined = " ".join(part for part in pending if part)
        if joined and text.strip(WHITESPACE):
            above[len(kept)] = joined
        pending = []
        kept.append(text)
    stripped = "".join(kept)
    dropped = len(kept) - len(split_rows(drop_leading_blank_lines(stripped))) if comments else 0
    return {row - dropped: text for row, text in above.items()}
