"""The line below the title of a report."""

from __future__ import annotations

from typing import Any

import pytest

from ra3_megatron.report.headline import headline

GIT = {"commit": "0123456789abcdef", "modified": True}
CPU = {"processor": "Abacus", "cores": 2, "accelerators": [], "git": None}


@pytest.mark.parametrize(
    ("config", "versions", "line"),
    [
        ("", None, ""),
        ("method: ra3", None, "method ra3"),
        ("{method: ra3, model: 5, parallel: {tensor: x}}", None, "method ra3"),
        (
            "{method: ra3, model: {num_layers: 2, hidden_size: 64, hf: null, precision: fp32}, parallel: {tensor: 1}}",
            CPU,
            "method ra3 · 2 layers of 64 channels · fp32 · 2 cores of Abacus",
        ),
        (
            "{method: rlvr, model: {hf: llama, num_layers: 9}, parallel: {tensor: 2, context: null, data: 4}}",
            {"processor": "Abacus", "accelerators": ["H200", "H200"], "git": GIT},
            "method rlvr · llama · tensor 2, data 4 · 2 x H200 · commit 0123456789 and changes",
        ),
    ],
)
def test_it_says_what_is_known(config: str, versions: dict[str, Any] | None, line: str) -> None:
    assert headline(config, versions) == line
