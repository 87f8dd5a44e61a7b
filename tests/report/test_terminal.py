"""The table on the terminal: right figures in right columns, 80 columns, thoughts set apart."""

import io
import re

import pytest
from made_run import SNIPPET, TOKENS_SNIPPET, arm, make_summary
from rich.console import Console

from ra3_megatron.report.numbers import clock, count, duration, number, percent
from ra3_megatron.report.snippets import thought_spans
from ra3_megatron.report.summary import Summary
from ra3_megatron.report.terminal import THOUGHT_STYLE, print_summary, snippet_text


def printed(summary: Summary, width: int = 80, run_dir: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(summary, console, run_dir)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(row))
    return re.split(r"\s{2,}", line[len(row) :].strip())


def test_every_figure_stands_in_its_column() -> None:
    text = printed(make_summary())
    assert cells(text, " " * 20) == ["base", "NTP", "RA3"]
    assert cells(text, "code cross-entropy (nats/token)") == ["2.4021", "2.1744", "2.1689"]
    assert cells(text, "thought cross-entropy (nats/token)") == ["4.2000", "–", "3.0125"]
    assert cells(text, "thinking rate (lines)") == ["3.1%", "0.0%", "28.7%"]
    assert cells(text, "mean thought length (tokens)") == ["7.9", "–", "5.4"]
    assert cells(text, "reward (nats/line)") == ["-2.3100", "–", "-1.9100"]
    assert cells(text, "tokens trained on") == ["1.23M", "1.23M", "1.23M"]
    assert cells(text, "E-step 1") == ["1 min 01 s", "812k", "13.3k", "5.2"]


def test_monitors_snippets_and_run_folder_are_there() -> None:
    text = printed(make_summary(), run_dir="runs/a" + "b" * 90)
    assert "! think_rate (estep, iteration 2): 0.91 of lines start a thought" in text
    assert "→ raise estep.latent_price" in text
    assert "infused snippet 2 of 2" in text
    lines = [line.rstrip() for line in text.splitlines()]
    start = lines.index("  def clamp(value, low, high):")
    assert lines[start : start + 8] == [f"  {line}" for line in SNIPPET.splitlines()]
    assert text.endswith(f"run folder  runs/a{'b' * 90}\n")


def test_nothing_is_wider_than_80_columns() -> None:
    assert max(map(len, printed(make_summary()).splitlines())) <= 80


def test_a_run_without_thoughts_has_no_empty_rows() -> None:
    text = printed(Summary(method="ntp", base=arm(2.4), ntp=arm(2.1)))
    assert "thought cross-entropy" not in text
    assert cells(text, "code cross-entropy (nats/token)") == ["2.4000", "2.1000"]


@pytest.mark.parametrize(
    ("snippet", "thoughts"),
    [
        (SNIPPET, ["# check the lower bound", "# then the upper <b>one</b>"]),
        (TOKENS_SNIPPET, ["<act>", "<think>integer division</think>", "<act>"]),
        ("x = 1  # not a thought\n", []),
        ("<think>without an end", ["<think>without an end"]),
    ],
)
def test_thoughts_are_found_and_styled(snippet: str, thoughts: list[str]) -> None:
    assert [snippet[start:end] for start, end in thought_spans(snippet)] == thoughts
    text = snippet_text(snippet)
    assert text.plain == snippet.rstrip()
    styled = [text.plain[span.start : span.end] for span in text.spans if span.style == THOUGHT_STYLE]
    assert styled == thoughts


def test_numbers() -> None:
    assert [number(v) for v in (None, 1234, 0.0, -1.5, 1e-5, 2e7, float("nan"))] == [
        "–",
        "1,234",
        "0.000",
        "-1.500",
        "1.00e-05",
        "2.00e+07",
        "nan",
    ]
    assert [count(v) for v in (None, 0, 7, 7.25, 950, 999.7, 8192, 999_999, 1.05e6, 3e9, 2e13)] == [
        "–",
        "0",
        "7",
        "7.25",
        "950",
        "1k",
        "8.19k",
        "1M",
        "1.05M",
        "3G",
        "20T",
    ]
    assert [duration(v) for v in (None, 0.84, 9.97, 59.7, 185, 7620)] == [
        "–",
        "0.8 s",
        "10 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert [clock(v) for v in (0.4, 42, 185, 7650)] == ["0:00", "0:42", "3:05", "2:07:30"]
    assert [percent(v) for v in (None, 0.2871)] == ["–", "28.7%"]
