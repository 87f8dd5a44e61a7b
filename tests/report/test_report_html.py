"""The report of a finished, a partial and an empty run: figures, pictures, text, and nothing from the network."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import CONFIG, SNIPPET, TOKENS_SNIPPET, make_run

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.build import CAPTIONS, build_report
from ra3_megatron.report.metrics import MetricsWriter, read_metrics
from ra3_megatron.report.plots import COLOURS, ESTEP_CURVES, draw_figures, series
from ra3_megatron.report.responses import ResponseRecord, write_responses
from ra3_megatron.report.rlvr import _samples
from ra3_megatron.report.run_folder import RunFolder
from ra3_megatron.report.summary import read_summary

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Text by section, pictures, marked texts; checks that every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.pictures: list[str] = []
        self.marked: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = values["id"] or ""
        if tag == "img":
            self.pictures.append(values["src"] or "")
        if tag == "mark":
            self.marked.append("")
        if tag in ("td", "th", "br"):
            self.handle_data(" ")
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if "mark" in self.open:
            self.marked[-1] += data


def test_finished_run_has_all_parts(run: Path) -> None:
    page = Page(build_report(run))
    assert {path.name for path in run.glob("figures/*")} == {f"{name}.png" for name in CAPTIONS}
    assert len(page.pictures) == len(CAPTIONS)
    written = {path.read_bytes() for path in run.glob("figures/*.png")}
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.pictures}
    assert embedded == written
    assert all(picture.startswith(b"\x89PNG") for picture in embedded)
    assert re.search(r"code cross-entropy \(nats/token\)\s*2\.4021\s*2\.1744\s*2\.1689", page.text["headline"])
    assert "raise estep.latent_price" in page.text["monitors"]
    assert "latent_price: 0.05  # <nats>" in page.text["configuration"]
    assert "2.13.0" in page.text["versions"]
    precision = " ".join(page.text["versions"].split())
    assert "asked for fp8_tensorwise linear layers Transformer Engine" in precision
    assert "warm_start: products with weights 2 in fp8_tensorwise, 1 in bf16" in precision
    assert "fp8_tensorwise: 1.linear_qkv, 1.linear_proj" in precision and "estep-1" not in precision
    assert "1,402,554" in page.text["data"]
    assert "E-step 1" in page.text["timings"]
    times = " ".join(page.text["where-the-time-goes"].split())
    assert "warm start E-step M-step (RA3) NTP control steps 100 40 80 80 a step 560 ms 2.0 s 560 ms 560 ms" in times
    assert "sampling – 38% 750 ms – – refit – 25% 498 ms – – scoring – 38% 750 ms – – forward 30% 168 ms –" in times
    assert "other 0% 0.0 ms <1% 2.0 ms" in times and "peak memory 41.50 GiB 2.50 GiB" in times
    assert "-2.3000 → -2.1000" in page.text["iterations"]
    assert "Nothing was logged" not in page.text["curves"]


def test_snippets_keep_every_character_and_mark_the_thoughts(run: Path) -> None:
    page = Page(build_report(run))
    assert SNIPPET.strip() in page.text["snippets"]
    assert TOKENS_SNIPPET.strip() in page.text["snippets"]
    assert page.marked == [
        "# check the lower bound",
        "# then the upper <b>one</b>",
        "<act>",
        "<think>integer division</think>",
        "<act>",
    ]


def test_report_needs_no_network(run: Path) -> None:
    path = build_report(run)
    assert all(link.startswith("data:") for link in Page(path).links)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text())
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_long_lists_of_the_manifest_are_cut(run: Path) -> None:
    text = Page(build_report(run)).text["data"]
    assert "m39.py" in text
    assert "m40.py" not in text
    assert "… and 59 more in the file" in text


def test_run_that_was_killed_says_what_is_missing(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "versions.json").unlink()
    (run / "precision.json").unlink()
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.rewind(lambda record: record["phase"] in ("warm_start", "evaluation"))
        writer.write("estep", 1, 1, {"monitor": "entropy", "message": "0.001 nats", "advice": "raise it"})
    page = Page(build_report(run))
    assert "has not ended: it was last seen in phase estep, iteration 1, step 1" in page.text[""]
    assert "No summary yet" in page.text["headline"]
    assert "raise it" in page.text["monitors"]
    assert CAPTIONS["estep"] in page.text["curves"].partition("Nothing was logged for")[2]
    assert "No versions.json" in page.text["versions"]
    assert {path.stem for path in run.glob("figures/*.png")} >= {"loss", "cross_entropy"}


def test_rebuilding_removes_pictures_that_are_no_longer_drawn(run: Path) -> None:
    build_report(run)
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.rewind(lambda record: False)
    (run / "summary.json").unlink()
    page = Page(build_report(run))
    assert page.pictures == []
    assert list(run.glob("figures/*")) == []
    assert "has logged nothing yet" in page.text[""]


def test_run_with_only_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = Page(build_report(tmp_path))
    assert "has logged nothing yet" in page.text[""]
    assert "No manifest" in page.text["data"]


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"model: [1\n", "config.yaml:2: "),
        ("config.yaml", b"\xff\xfe", "config.yaml: is not UTF-8 text"),
        ("config.yaml", b"- ra3\n", "config.yaml:1: must be a mapping of keys"),
        ("versions.json", b"[]", "versions.json: holds no JSON object"),
        ("precision.json", b"5", "precision.json: holds no JSON object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        build_report(tmp_path / "run")


def test_iterations_follow_each_other(run: Path) -> None:
    curve = series(read_metrics(run), "estep", "think_rate")
    assert curve.steps == list(range(1, 41))
    assert curve.boundaries == [20]
    assert curve.values == pytest.approx([0.05 + 0.02 * step for step in range(1, 21)] * 2)
    assert [(steps[0], steps[-1]) for steps, _ in curve.pieces()] == [(1, 20), (21, 40)]


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0)):
            writer.write("mstep", 1, step, {"loss": loss})
    curve = series(read_metrics(tmp_path), "mstep", "loss")
    assert (curve.steps, curve.values) == ([1, 3], [3.0, 2.0])


def test_held_out_curves_are_the_same_from_summary_and_from_evaluations(run: Path) -> None:
    records = read_metrics(run)
    for summary, last in ((read_summary(run), {"ra3": 2.1689, "ntp": 2.1744}), (None, {"ra3": 2.18, "ntp": 2.2})):
        (axes,) = draw_figures(records, summary)["cross_entropy"].axes
        curves = {line.get_color(): line for line in axes.lines}
        for arm, value in last.items():
            line = curves[COLOURS[arm]]
            assert list(line.get_xdata()) == [0, 1, 2]
            assert line.get_ydata()[0] == 2.4021
            assert line.get_ydata()[-1] == pytest.approx(value)


def test_estep_figure_has_a_panel_for_each_metric(run: Path) -> None:
    figure = draw_figures(read_metrics(run), None)["estep"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(ESTEP_CURVES.values())


@pytest.mark.parametrize("code", [True, False])
def test_prompts_of_responses_hold_no_thoughts(tmp_path: Path, code: bool) -> None:
    """Their comments are the problem's, and only some are Python."""
    prompt = "# Add <two>.\ndef add(a, b):\n"
    record = ResponseRecord(
        problem="add", step=0, prompt=prompt, text="    # so\n    return a + b\n", reward=1.0, verdict="passed",
        passed=1, total=1, detail="", code_prompt=code,
    )  # fmt: skip
    write_responses(tmp_path, "held-out-000000", [record])
    ((shown,),) = (sample["responses"] for sample in _samples(RunFolder(tmp_path)))
    assert "<mark>" not in shown["prompt"] and "<mark># so</mark>" in shown["text"]
    assert "&lt;two&gt;" in shown["prompt"] and ("<span" in shown["prompt"]) == code
