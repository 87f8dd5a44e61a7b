"""Loading and writing a configuration. Not covered: what each key does to a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_without_anything_the_defaults() -> None:
    assert load_config(None, []) == RunConfig()


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    path = written(tmp_path, "estep:\n  steps: 7\n  horizon: 2\nmstep:\n")
    config = load_config(path, ["estep.steps=8", "estep.steps=9", "seed=3"])
    assert (config.estep.steps, config.estep.horizon, config.seed) == (9, 2, 3)
    assert config.mstep == RunConfig().mstep


def test_a_key_of_a_nested_section_keeps_that_sections_other_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "estep:\n  optimizer:\n    learning_rate: 1e-4\n")
    for config in (load_config(path), load_config(None, ["estep.optimizer={learning_rate: 1e-4}"])):
        assert config.estep.optimizer.learning_rate == 1e-4
        assert config.estep.optimizer.schedule == "constant"
        assert config.estep.optimizer.warmup_fraction == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E+1", 20.0),
        (".5", 0.5),
        ("3", 3.0),
        ("1_000.5", 1000.5),
        ("inf", math.inf),
        (".inf", math.inf),
        ("+.Inf", math.inf),
    ],
)
def test_numbers_in_file_and_override(tmp_path: Path, text: str, value: float) -> None:
    path = written(tmp_path, f"estep:\n  latent_price: {text}\n")
    for config in (load_config(path), load_config(None, [f"estep.latent_price={text}"])):
        assert config.estep.latent_price == value
        assert isinstance(config.estep.latent_price, float)


def test_words_of_yaml_1_1_are_strings(tmp_path: Path) -> None:
    path = written(tmp_path, "run_dir: 2024-01-31\nlogging: {progress: off}\nseed: 010\n")
    config = load_config(path)
    assert (config.run_dir, config.logging.progress, config.seed) == ("2024-01-31", "off", 10)
    assert load_config(None, ["logging.progress=off"]).logging.progress == "off"


def test_override_values() -> None:
    config = load_config(
        None,
        [
            "corpus.packages=[numpy, 'sympy']",
            "estep.clip_ratio=null",
            "em.control=false",
            "run_dir=*a: b # c",
            "seed= 5 ",
        ],
    )
    assert config.corpus.packages == ["numpy", "sympy"]
    assert config.estep.clip_ratio is None
    assert config.em.control is False
    assert config.run_dir == "*a: b # c"
    assert config.seed == 5
    assert load_config(None, ['run_dir="2024"']).run_dir == "2024"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("estep.group_size=1", "estep.group_size=1: must be at least 2"),
        ("estep.discount=1.5", "estep.discount=1.5: must be at most 1"),
        ("model.rope_base=0", "model.rope_base=0: must be greater than 0"),
        ("estep.steps=1.5", "estep.steps=1.5: must be an integer"),
        ("estep.steps=true", "estep.steps=true: must be an integer"),
        ("estep.steps=", "estep.steps=null: must be an integer"),
        ("estep.latent_price=cheap", "estep.latent_price=cheap: must be a number"),
        ("estep.latent_price=nan", "estep.latent_price=.nan: must be at least 0"),
        ("estep.entropy_coefficient=inf", "estep.entropy_coefficient=.inf: must be a finite number"),
        ("estep.clip_ratio=none", "estep.clip_ratio=none: must be a number or null"),
        ("em.control=1", "em.control=1: must be true or false"),
        ("run_dir=''", "run_dir=: must be a string that is not empty"),
        ("run_dir=7", "run_dir=7: must be a string (write numbers and words such as true in quotes)"),
        ("rollout.sampler=fast", "rollout.sampler=fast: must be one of jump_ahead, naive"),
        ("corpus.packages=numpy", "corpus.packages=numpy: must be a list, such as [a, b]"),
        (
            "corpus.packages=[a, 1]",
            "corpus.packages[1]=1: must be a string (write numbers and words such as true in quotes)",
        ),
        pytest.param("seed=" + "9" * 5000, "seed=" + "9" * 54 + "…: a number of too many digits", id="5000 digits"),
        ("estep=3", "estep=3: estep is a section; override one of its keys, estep.steps=…"),
        ("estep.groupsize=3", "estep.groupsize: unknown key; did you mean estep.group_size?"),
        ("latent_price=3", "latent_price: unknown key; did you mean estep.latent_price?"),
        ("eval.documents=3", "eval.documents: unknown key; did you mean evaluation.documents?"),
        ("estep.steps.more=3", "estep.steps.more: unknown key; did you mean estep.steps?"),
        ("qqqq=3", "qqqq: unknown key; `ra3 config --describe` lists all keys"),
        ("estep.steps", "estep.steps: is no override; write section.key=value, such as estep.steps=5"),
        ("=3", "=3: is no override; write section.key=value, such as estep.steps=5"),
        (
            "mstep.optimizer.min_learning_rate=1",
            "mstep.optimizer.min_learning_rate=1.0 is above learning_rate=0.001",
        ),
        ("warm_start.micro_batch_size=7", "warm_start.micro_batch_size=7 does not divide global_batch_size=16"),
        (
            "corpus.path=code",
            "corpus.path=code is not read with corpus.source=installed: use folder, say",
        ),
        (
            "evaluation.observed_thoughts=true",
            "evaluation.observed_thoughts=true goes with corpus.human_comments=as_thoughts: with strip no comment "
            "stands for a thought",
        ),
        (
            "corpus.hub_split=test",
            "corpus.hub_split=test is not read with corpus.source=installed: it goes with hub",
        ),
        ("corpus.streaming=true", "corpus.streaming=true is not read with corpus.source=installed: it goes with hub"),
        (
            "corpus.tasks.plain_drill_share=0.5",
            "corpus.tasks.plain_drill_share=0.5 is not read with corpus.tasks.drill_share=0.0: it is a share of the "
            "drills; set drill_share too",
        ),
        ("corpus.source=folder", "corpus.path is missing: corpus.source=folder needs one"),
        (
            "parallel.sequence=true",
            "parallel.sequence=true needs parallel.tensor >= 2",
        ),
    ],
)
def test_a_mistake_is_named_with_key_value_and_what_is_right(override: str, line: str) -> None:
    assert problems(override) == [line]


def test_every_problem_has_its_line_and_none_is_pydantics_own() -> None:
    lines = problems("estep.group_size=1", "seed=-1", "em.itertions=3", "model.precision=fp8", "text.token_span=x")
    assert sorted(line.partition("=")[0].partition(":")[0] for line in lines) == [
        "em.itertions",
        "estep.group_size",
        "model.precision",
        "seed",
        "text.token_span",
    ]
    assert not any("http" in line or "Value error" in line or "Input should" in line for line in lines)


def test_impossible_combinations_of_sections_are_all_listed() -> None:
    lines = problems("parallel.tensor=3", "corpus.human_comments=keep", "text.max_latent_tokens=200")
    assert len(lines) == 3
    assert lines[0].startswith("corpus.human_comments=keep does not go with text.latent_format=comment")
    assert lines[1].startswith("parallel.tensor=3 does not divide model.num_attention_heads=8, model.num_query_groups")
    assert lines[-1].startswith("text.max_latent_tokens=200 leaves no room")


def test_keys_of_another_corpus_source_are_refused() -> None:
    lines = problems("corpus.source=jsonl", "corpus.path=x", "corpus.packages=[numpy]", "corpus.hub_config=en")
    assert lines == [
        "corpus.packages=['numpy'] is not read with corpus.source=jsonl: it goes with installed",
        "corpus.hub_config=en is not read with corpus.source=jsonl: it goes with hub",
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["corpus.source=jsonl", "corpus.path=x", "corpus.unit=file"],
            "corpus.unit=file is not read with corpus.source=jsonl: it goes with installed, folder",
        ),
        (
            ["corpus.source=tasks", "corpus.tasks.family=stateprog", "corpus.tasks.inline=false"],
            "corpus.tasks.inline=false is not read with corpus.tasks.family=stateprog: it goes with hopprog",
        ),
        (
            ["method=ntp", "mstep.latents=filler"],
            "mstep.latents=filler is not read with method=ntp, which has no latents: it goes with method=ra3",
        ),
        (
            ["estep.latent_price=inf", "mstep.latents=moved"],
            "mstep.latents=moved is not read with estep.latent_price=inf (never think): give a finite price",
        ),
        (
            ["estep.latent_price=inf", "estep.policy=runs/a/checkpoints/estep-1/final"],
            "estep.policy=runs/a/checkpoints/estep-1/final is not read with estep.latent_price=inf (never think): give "
            "a finite price",
        ),
        (
            ["estep.optimizer.min_learning_rate=1e-5"],
            "estep.optimizer.min_learning_rate=1e-05 is not read with schedule=constant, which ends where it began: it "
            "goes with cosine, linear",
        ),
        (
            ["tokenizer.kind=hf", "tokenizer.path=x", "tokenizer.superwords=true"],
            "tokenizer.superwords=true is not read with tokenizer.kind=hf: its pieces are there already; set it to "
            "false",
        ),
    ],
)
def test_keys_that_would_not_be_read_are_refused(overrides: list[str], line: str) -> None:
    assert problems(*overrides) == [line]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("estep:\n  steps: 1\n  horizon: 2\n  steps: 2\n", ":4: ", "duplicate key 'steps' (first on line 2)"),
        ("seed: 1\nestep: [\n", ":3: ", "expected the node content"),
        ("seed: 1\n\tx: 2\n", ":2: ", "cannot start any token"),
        ("- seed\n", ":1: ", "must be a mapping of sections"),
        ("seed: 1\n---\nseed: 2\n", ":2: ", "another document"),
        ("seed: 1\nrun_dir: !!python/name:os.system\n", ":2: ", "could not determine a constructor"),
        ("seed: 1\nrun_dir: a\0b\n", ":2: ", "character U+0000"),
        ("[a, b]: 1\n", ":1: ", "a key must be a word"),
    ],
)
def test_malformed_yaml_is_refused_with_file_and_line(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = written(tmp_path, text)
    (line,) = problems(path=path)
    assert line.startswith(f"{path}{where}")
    assert what in line


def test_keys_in_a_file(tmp_path: Path) -> None:
    assert problems(path=written(tmp_path, "estep.steps: 3\n")) == [
        "estep.steps: unknown key; write it nested, one level of indentation for each dot"
    ]
    assert problems(path=written(tmp_path, "1: 3\n")) == ["1: unknown key; `ra3 config --describe` lists all keys"]
    assert problems(path=written(tmp_path, "estep: &e {steps: *e}\n"))[0].startswith("estep.steps=")


def test_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert problems(path=missing) == [f"{missing}: no such configuration file"]
    assert problems(path=tmp_path) == [f"{tmp_path}: is a folder, not a configuration file"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\xfe")
    assert problems(path=binary) == [f"{binary}: is not UTF-8 text"]


def test_a_file_with_byte_order_mark_and_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config(path).seed == 3
    path.write_bytes(b"# nothing\n")
    assert load_config(path) == RunConfig()


def test_dump_names_every_key_and_loads_back(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["estep.latent_price=inf", "logging.progress=off", "corpus.packages=[numpy]"])
    text = dump_config(config)
    assert text.startswith("# ")
    assert load_config(written(tmp_path, text)) == config
    assert dump_config(load_config(written(tmp_path, text))) == text


TRICKY = st.sampled_from(
    [
        "1e-3",
        "inf",
        "null",
        "~",
        "off",
        "yes",
        "010",
        "1_0",
        "0x1",
        "<<",
        "=",
        "- a",
        "# a",
        "a: b",
        "1:30",
        "2024-01-01",
    ]
)


@given(
    name=TRICKY | st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1),
    packages=st.lists(TRICKY | st.text(alphabet=st.characters(exclude_categories=["Cs"]))),
    price=st.floats(min_value=0, allow_nan=False),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    clip=st.none() | st.floats(min_value=1e-300, allow_infinity=False),
    steps=st.integers(min_value=0),
)
def test_any_configuration_survives_dump_and_load(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    packages: list[str],
    price: float,
    rate: float,
    clip: float | None,
    steps: int,
) -> None:
    values = RunConfig().model_dump()
    values["run_dir"] = name
    values["corpus"]["packages"] = packages
    values["estep"].update(latent_price=price, clip_ratio=clip, steps=steps)
    values["mstep"]["optimizer"]["learning_rate"] = rate
    config = RunConfig.model_validate(values)
    path = written(tmp_path_factory.mktemp("dump"), dump_config(config))
    assert load_config(path) == config


def test_quickstart_example_loads() -> None:
    config = load_config(QUICKSTART)
    assert config.run_dir == "runs/quickstart"
    assert config.parallel.world_size == 1


def test_fp8_engines_need_a_correction_and_weights_that_vllm_quantises() -> None:
    vllm, fp8, bf16 = "rollout.engine=vllm", "rollout.vllm.quantization=fp8", "model.precision=bf16"
    assert load_config(None, [vllm, fp8, bf16, "estep.importance_cap=2"]).rollout.vllm.quantization == "fp8"
    assert load_config(None, [vllm, fp8, bf16, "method=ntp"]).estep.importance_cap is None
    (line,) = problems(vllm, fp8, bf16, "estep.clip_ratio=0.2")
    assert line == f"{fp8} samples with another policy than the trainer's: set estep.importance_cap (2, say)"
    (line,) = problems(vllm, fp8, bf16, "method=rlvr", "rlvr.checkpoint=x", "estep.importance_cap=2")
    assert line == f"{fp8} samples with another policy than the trainer's: set rlvr.importance_cap (2, say)"
    (line,) = problems(vllm, fp8, "model.precision=fp32", "estep.importance_cap=2")
    assert line == f"{fp8} needs model.precision=bf16: vLLM quantises no fp32 model"
    (line,) = problems(vllm, fp8, bf16, "estep.importance_cap=2", "model.num_experts=4")
    assert line == f"{fp8} does not go with model.num_experts=4: refits of experts are untested"
    (line,) = problems(fp8, bf16, "estep.importance_cap=2")
    assert line == "rollout.vllm.quantization=fp8 needs rollout.engine=vllm"


def test_a_folder_that_cannot_be_read_has_one_line(tmp_path: Path) -> None:
    """Not a second one, on a warm start that `model.hf` switches off."""
    layout = ("parallel.data=4", "warm_start.global_batch_size=24")
    missing = f"model.hf={tmp_path / 'none'}"
    (line,) = problems(missing, *layout)
    assert line.startswith(f"{missing}: ") and "no such folder" in line
    assert len(problems(missing, *layout, "warm_start.steps=3")) == 2
    assert len(problems(missing, path=written(tmp_path, "warm_start: 3\n"))) == 2
