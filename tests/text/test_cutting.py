"""What a harness sees: thoughts are gone first, then the text ends before the first stop; tokens are counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.text.cutting import Cutter, Thoughts
from ra3_megatron.text.fences import program_in

PROMPT = 'def f(x):\n    """Twice."""\n'
HUMANEVAL = SUITES["humaneval"].stops


@dataclass
class Bytes:
    """Every byte is a token; three more are the markers of thoughts, and one ends a document."""

    token_bytes: list[bytes] = field(default_factory=lambda: [*(bytes([b]) for b in range(256)), b"", b"", b"", b""])
    special: dict[str, int] = field(default_factory=lambda: {"<act>": 256, "<think>": 257, "</think>": 258})
    eos: int = 259


def ids(text: str) -> list[int]:
    """Ids of a text in which «, » and ¦ stand for <think>, </think> and <act>, and ¶ for the end."""
    found: list[int] = []
    for letter in text:
        marker = {"¦": 256, "«": 257, "»": 258, "¶": 259}.get(letter)
        found += [marker] if marker else list(letter.encode())
    return found


def cut(  # type: ignore[no-untyped-def]
    text: str,
    thoughts: Thoughts,
    stops: tuple[str, ...] = HUMANEVAL,
    prompt: str = PROMPT,
    code: bool = True,
    fenced: bool = False,
):
    return Cutter(Bytes(), stops, thoughts, code, fenced).cut(prompt, ids(text))  # type: ignore[arg-type]


def test_a_thought_at_column_0_does_not_end_a_completion() -> None:
    written = "    y = 2 * x\n# now give it back\n    return y\n\nprint(f(1))\n"
    found = cut(written, thoughts="comment")
    assert found.text == "    y = 2 * x\n    return y\n" and found.stopped
    assert found.thought_tokens == len("# now give it back\n")
    assert found.tokens == len("    y = 2 * x\n# now give it back\n    return y\n")
    assert cut(written, thoughts="none").text == "    y = 2 * x", "as an ordinary model is cut"


def test_thoughts_at_every_depth_go_and_other_signs_stay() -> None:
    written = '    # first\n    y = "# no"  # after code\n    # second\n    z = """\n# inside\n"""\n    return y\n'
    found = cut(written, thoughts="comment", stops=())
    assert (
        found.text == '    y = "# no"  # after code\n    z = """\n# inside\n"""\n    return y\n' and not found.stopped
    )
    assert found.thoughts == 2 and found.thought_tokens == len("    # first\n") + len("    # second\n")


def test_the_prompts_own_comments_are_no_thoughts() -> None:
    found = cut("    return x\n", thoughts="comment", prompt="# a comment\ndef f(x):\n    # another\n")
    assert found.text == "    return x\n" and found.thought_tokens == 0
    half = cut("go on\n    return x\n", thoughts="comment", prompt="def f(x):\n    # here ")
    assert half.text == "go on\n    return x\n", "a line that the prompt began is not the model's"


def test_a_prompt_that_is_no_code_is_not_read_as_code() -> None:
    found = cut(
        "def f():\n    # think\n    return 1\n[DONE] x", "comment", ("[DONE]",), 'Write "f.\n[BEGIN]\n', code=False
    )
    assert found.text == "def f():\n    return 1\n" and found.stopped


def test_where_it_is_no_python_comment_lines_go_too() -> None:
    assert cut("    ) ] return\n# thought\n    x\n", "comment", ()).text == "    ) ] return\n    x\n"


@pytest.mark.parametrize("before", ["", "Here's the program:\n# think\n```text\n#.\n```\n"])
def test_a_fenced_program_is_read_by_itself(before: str) -> None:
    """A "#" line of its strings is no thought; comments, in the block and around it, are; the text may end anywhere."""
    written = "```python\nprint('''\\\n#.\n##''')\n# think\nx = 1\n```\nDone (isn't it)\n# think\n"
    kept = (before + written).replace("# think\n", "").replace("text\n#.\n", "text\n")
    found = cut(before + written, "comment", (), "Print.\n", code=False, fenced=True)
    assert found.text == kept and program_in(found.text) == "print('''\\\n#.\n##''')\nx = 1\n"
    assert found.thoughts == (before + written).count("# think") + before.count("#.")
    behind = len(before) + written.index("x = 1")
    assert (
        cut((before + written)[:behind], "comment", (), "Print.\n", code=False, fenced=True).text
        == (kept[: kept.index("x = 1")])
    )
    stopped = cut(before + written, "comment", ("\nx =",), "Print.\n", code=False, fenced=True)
    assert program_in(stopped.text) == "print('''\\\n#.\n##''')" and stopped.stopped


def test_marked_thoughts() -> None:
    found = cut("¦    y = x\n« \nclass: think»    return y\n¶", thoughts="tokens")
    assert found.text == "    y = x\n    return y\n" and not found.stopped
    assert (
        found.thoughts == 1
        and found.thought_tokens == len("« \nclass: think»")
        and found.tokens == len("¦    y = x\n« \nclass: think»    return y\n¶")
    )
    assert cut("    y = x\n« never ends \ndef ", thoughts="tokens").text == "    y = x\n"
    two = cut("«a«b»    x\n«open \ndef", thoughts="tokens")
    assert (two.text, two.thoughts, two.thought_tokens) == ("    x\n", 2, len("«a«b»«open \ndef"))
    stray = cut("    y = x»\n", thoughts="tokens")
    assert (stray.text, stray.thoughts, stray.thought_tokens) == ("    y = x\n", 0, 0), "an end alone says nothing"


@pytest.mark.parametrize("thoughts", ["comment", "tokens", "none"])
def test_what_a_token_that_ends_a_completion_is_called_is_no_text(thoughts: Thoughts) -> None:
    """An end that a model has beside its tokenizer's may be an ordinary token with a text of its own."""
    named = Bytes()
    named.token_bytes[259] = b"\ndef end"
    written = ids("    return 1¶")
    for ends, text in ((frozenset({259}), "    return 1"), (frozenset(), "    return 1\ndef end")):
        found = Cutter(named, (), thoughts, True, ends=ends).cut(PROMPT, written)  # type: ignore[arg-type]
        assert (found.text, found.tokens, found.stopped) == (text, len(written), False)
    stops = Cutter(named, HUMANEVAL, thoughts, True, ends=frozenset({259}))  # type: ignore[arg-type]
    assert stops.ended(PROMPT, written) is None and not stops.cut(PROMPT, written).stopped


def test_the_first_stop_ends_it_and_what_follows_is_not_counted() -> None:
    found = cut("    return 1\nif x:\n# thought\nclass A", thoughts="comment")
    assert (found.text, found.tokens, found.thought_tokens) == ("    return 1", len("    return 1"), 0)
    assert found.thoughts == 0, "it stands behind the cut"
    assert cut("\nclass", thoughts="comment").tokens == 0


def test_a_section_of_the_prompt_format_is_a_stop_and_no_thought() -> None:
    found = cut("# think\nprint(1)\n### Question\nmore\n", "comment", ("###",), "### Answer\n\n", code=False)
    assert (found.text, found.stopped, found.thought_tokens) == ("print(1)\n", True, len("# think\n"))


@pytest.mark.parametrize("text", ["    é = 'ß'\n# ü\n    return é\n\ndef", "    x\r\n    # a\r\n    return x\r\n\ndef"])
def test_bytes_that_are_no_ascii_and_other_line_ends(text: str) -> None:
    found = cut(text, thoughts="comment")
    kept = [row for row in text.split("\n")[:-1] if not row.strip().startswith("#")]
    assert found.text == "\n".join(kept) and found.stopped


def test_half_a_character_at_the_end() -> None:
    assert Cutter(Bytes(), (), "none", True).cut("", "aé".encode()[:2]).text == "a\ufffd"  # type: ignore[arg-type]


def test_where_a_stop_is_complete() -> None:
    def ended(text: str, thoughts: Thoughts) -> int | None:
        return Cutter(Bytes(), HUMANEVAL, thoughts, True).ended(PROMPT, ids(text))  # type: ignore[arg-type]

    assert ended("    return 1\n# a thought\ndef g", "comment") == len("    return 1\n# a thought\ndef")
    assert ended("    return 1\n", "comment") is None
    assert ended("\nclass A", "comment") == len("\nclass"), "at the very beginning"
    marked = "    return 1«\nx»\nde«»f¶"
    assert ended(marked, "tokens") == len("    return 1«\nx»\nde«»f"), "thoughts between are among them"


WRITTEN = ["\n", "#", "a", "    ", '"""', "def", "if", "é", "\r", "##", "```"]


@given(st.lists(st.sampled_from(WRITTEN), max_size=30), st.data())
def test_where_it_ends_does_not_depend_on_how_often_it_is_looked_at(parts: list[str], data: st.DataObject) -> None:
    stops = data.draw(st.sampled_from([HUMANEVAL, ("\n\n\n", "a\n\ndef"), ("###",), ("é\n",), ()]))
    fenced = data.draw(st.booleans())
    cutter = Cutter(Bytes(), stops, "comment", not fenced, fenced)  # type: ignore[arg-type]
    sampled = ids("".join(parts))

    def in_pieces(sizes: Iterable[int]) -> int | None:
        seen = 0
        for size in sizes:
            found = cutter.ended(PROMPT, sampled[: seen + size], seen)
            if found is not None or (seen := seen + size) >= len(sampled):
                return found
        return None

    end = in_pieces([len(sampled)])
    assert in_pieces(repeat(1)) == end and in_pieces(repeat(data.draw(st.integers(2, 40)))) == end
    stopped = [cutter.cut(PROMPT, sampled[:length]).stopped for length in range(len(sampled) + 1)]
    assert end == (stopped.index(True) if any(stopped) else None), "the first text that meets a stop"
