"""Counts of latents by hand, and the signs of failure that are read off them."""

from collections.abc import Sequence
from typing import Any

import pytest
from toy import LARGE, Toy

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.training import MonitorConfig
from ra3_megatron.em.latent_stats import LatentStats, blank_tokens, latent_stats
from ra3_megatron.em.monitors import check_estep, check_mstep, check_pruning
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import compose
from ra3_megatron.training.agreement import require_agreement
from ra3_megatron.training.alarms import Alarm


def stats(toy: Toy, *transcripts: dict[int, Sequence[int]]) -> LatentStats:
    document = toy.document("a = b\n   b\nc\n")
    composed = [compose(document, thoughts, toy.latents, toy.tokenizer) for thoughts in transcripts]
    return latent_stats(composed, blank_tokens(toy.tokenizer))


def test_counts_of_comments(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=5)
    one = {token: n for n, token in enumerate(toy.tokenizer.token_bytes)}
    sharp, spaced, space, end, a = (one[t] for t in (b"#", b" #", b" ", b"\n", b"a"))
    found = stats(
        toy,
        {},
        {0: [sharp, a, end], 1: [spaced, a, end], 2: [sharp, one[b" b"], one[b"c\n"]]},
        # the line below it, but for layout; "b" is another token than the line's " b"
        {0: [sharp, space, a, one[b" = "], one[b"b"]], 1: [spaced, one[b"b"], end]},
        {0: [sharp, end]},  # says nothing
    )
    assert found == LatentStats(lines=12, thoughts=6, thought_tokens=2 + 2 + 3 + 4 + 2 + 1, most_common=2, copies=1)
    assert found.think_rate == 0.5
    assert found.mean_thought_tokens == pytest.approx(14 / 6)
    assert found.metrics() == pytest.approx(
        {
            "think_rate": 0.5,
            "thoughts": 6,
            "mean_thought_tokens": 14 / 6,
            "identical_thoughts": 1 / 3,
            "copied_thoughts": 1 / 6,
        }
    )


def test_counts_of_blocks(runtime: Runtime) -> None:
    toy = Toy(runtime, "tokens", LARGE, max_latent_tokens=3)
    special, one = toy.tokenizer.special, {token: n for n, token in enumerate(toy.tokenizer.token_bytes)}
    think, end, a = special["<think>"], special["</think>"], one[b"a"]
    found = stats(
        toy, {0: [think, a, end], 1: [think, one[b" b"], end], 2: [think, a, one[b" "], a]}, {2: [think, end]}
    )
    assert found == LatentStats(lines=6, thoughts=4, thought_tokens=4, most_common=1, copies=1)


def test_nothing_thought(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=2)
    assert stats(toy, {}, {}).metrics() == {"think_rate": 0.0}
    assert stats(toy).metrics() == {"think_rate": 0.0}
    assert stats(toy, {}).mean_thought_tokens is None


def test_blank_tokens(runtime: Runtime) -> None:
    toy = Toy(runtime, "tokens", LARGE, max_latent_tokens=2)
    blank = blank_tokens(toy.tokenizer)
    table = toy.tokenizer.token_bytes
    assert {table[i] for i in blank.invisible} == {b"", b"\n", b"  ", b"\n\n", b" ", b"\t", b"\n  "}
    assert {table[i] for i in blank.empty - blank.invisible} == {b"#", b" #"}
    assert {*toy.tokenizer.special.values(), toy.tokenizer.eos} <= blank.invisible


# -- monitors -----------------------------------------------------------------------------------------------------

QUIET = {
    "think_rate": 0.8,
    "decision_entropy": 0.01,
    "thoughts": 20,
    "identical_thoughts": 0.5,
    "copied_thoughts": 0.5,
}
"""Figures at the thresholds: nothing is wrong yet."""


def names(alarms: list[Alarm]) -> list[str]:
    for alarm in alarms:
        assert alarm.message and alarm.advice
    return [alarm.name for alarm in alarms]


def test_at_the_thresholds_no_alarm_is_given() -> None:
    assert check_estep(QUIET, MonitorConfig()) == []


@pytest.mark.parametrize(
    ("key", "value", "name", "said"),
    [
        ("think_rate", 0.81, "latent price too low", "81%"),
        ("decision_entropy", 0.009, "entropy collapse", "0.0090"),
        ("identical_thoughts", 0.51, "degenerate latents", "one and the same"),
        ("copied_thoughts", 0.51, "degenerate latents", "copy the line"),
    ],
)
def test_each_sign_of_an_estep(key: str, value: float, name: str, said: str) -> None:
    (alarm,) = check_estep(QUIET | {key: value}, MonitorConfig())
    assert alarm.name == name and said in alarm.message and "estep." in alarm.advice


def test_thresholds_are_those_of_the_configuration() -> None:
    config = MonitorConfig(max_think_rate=0.5, max_identical_thoughts=0.2, min_decision_entropy=0.3)
    assert names(check_estep(QUIET, config)) == [
        "latent price too low",
        "entropy collapse",
        "degenerate latents",
        "degenerate latents",
    ]


DIFFERENT = {"log_prob_mismatch": 0.06, "log_prob_difference": 0.07, "largest_log_prob_difference": 0.4}


def test_an_engine_that_disagrees_with_the_trainer_stops_the_run() -> None:
    with pytest.raises(UserError) as error:
        require_agreement("estep", "estep-1 step 3", DIFFERENT | {"staleness": 0.0}, RunConfig())
    message = str(error.value)
    for part in ("estep-1 step 3", "6.0%", "monitors.max_log_prob_mismatch=0.05", "0.07", "0.4", "likely causes"):
        assert part in message
    assert "\n" not in message and message.endswith("set estep.importance_cap")


def test_a_small_difference_and_what_was_learned_since_stop_nothing() -> None:
    require_agreement("estep", "estep-1 step 3", DIFFERENT | {"log_prob_mismatch": 0.05, "staleness": 0.0}, RunConfig())
    require_agreement("estep", "estep-1 step 3", DIFFERENT | {"staleness": 1.0}, RunConfig())


def test_fp8_engines_have_a_limit_of_their_own() -> None:
    config = load_config(
        None,
        ["rollout.engine=vllm", "rollout.vllm.quantization=fp8", "model.precision=bf16", "estep.importance_cap=2"],
    )
    require_agreement("estep", "estep-1 step 3", DIFFERENT | {"log_prob_mismatch": 0.19, "staleness": 0.0}, config)
    trained = RunConfig.model_validate({"rollout": {"engine": "vllm"}, "model": {"precision": "fp8_tensorwise"}})
    for each in (config, trained):
        with pytest.raises(UserError, match=r"21\.0% \(limit monitors\.max_fp8_log_prob_mismatch=0\.2\)"):
            off = DIFFERENT | {"log_prob_mismatch": 0.21, "staleness": 0.0}
            require_agreement("estep", "estep-1 step 3", off, each)


def test_few_thoughts_say_nothing_about_degeneration() -> None:
    odd = QUIET | {"identical_thoughts": 1.0, "copied_thoughts": 1.0}
    assert names(check_estep(odd, MonitorConfig())) == ["degenerate latents"] * 2
    assert check_estep(odd | {"thoughts": 19}, MonitorConfig()) == []


def test_without_thoughts_they_are_not_degenerate() -> None:
    quiet = {k: v for k, v in QUIET.items() if "thoughts" not in k}
    assert check_estep(quiet | {"think_rate": 0.0}, MonitorConfig()) == []


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"code_ce": 1.9}, []),
        ({"code_ce": 2.0, "raw_code_ce": 2.9}, []),
        ({"code_ce": 1.9, "raw_code_ce": 3.1}, []),
        ({"code_ce": 2.0, "raw_code_ce": 3.0}, ["M-step does not learn"]),
        ({"ntp_code_ce": 1.9}, []),
        ({"ntp_code_ce": 1.8995}, []),
        ({"ntp_code_ce": 1.85}, ["noisy latents"]),
        ({"code_ce": 2.1, "raw_code_ce": 3.1, "ntp_code_ce": 1.8}, ["M-step does not learn", "noisy latents"]),
    ],
)
def test_signs_of_an_mstep(figures: dict[str, Any], expected: list[str]) -> None:
    quiet = {"code_ce": 1.9, "previous": 2.0, "raw_code_ce": 2.9, "previous_raw": 3.0, "ntp_code_ce": None}
    assert names(check_mstep(**(quiet | figures), config=MonitorConfig())) == expected


def test_lines_that_the_base_could_write_and_are_lost() -> None:
    base = [0.5] * 100
    config = MonitorConfig(lost_line_nats=2.0, max_lost_lines=0.05)
    assert check_pruning(base, [2.4] * 100, config) == [], "dearer, not lost"
    assert check_pruning(base, [9.0] * 5 + [0.1] * 95, config) == [], "few"
    (alarm,) = check_pruning(base, [9.0] * 6 + [0.1] * 94, config)
    assert alarm.name == "pruned actions" and "6% of held-out lines" in alarm.message
    assert check_pruning([], [], config) == []
