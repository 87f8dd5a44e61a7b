"""Checkpoints of runs as Hugging Face folders: models trained from scratch, and those that came from such a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import assert_close, load, logits, make
from safetensors.torch import load_file

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.hf.checking import Check
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.files import keep_small_files
from ra3_megatron.hf.importing import import_hf
from ra3_megatron.hf.origin import RUN_FOLDER
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.tokenizer import train_sentencepiece
from ra3_megatron.training.identity import identity_of

SINGLE = ParallelConfig(threads=1)
TEXT = "def f(x):\n    # the square of x\n    return x * x\n"


@pytest.mark.parametrize(
    "experts", [{}, {"num_experts": 4, "expert_ffn_hidden_size": 24}], ids=["dense", "experts of another width"]
)
def test_a_model_trained_from_scratch(experts: dict[str, int], tmp_path: Path, runtime: Runtime) -> None:
    """transformers computes what Megatron-Core does, and its tokenizer gives the ids of the run's."""
    run = tmp_path / "run"
    tokenizer = train_sentencepiece([TEXT * 5], 300, run / "corpus" / "tokenizer")
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        context_length=64,
        init_std=0.2,
        rope_base=5e5,
        norm_epsilon=3e-5,
        **experts,  # type: ignore[arg-type]
    )
    (run / "config.yaml").write_text(dump_config(RunConfig(model=model)))
    sets = torch.ones(1, tokenizer.vocab_size, dtype=torch.bool)
    network = build_model(model, SINGLE, runtime, tokenizer.vocab_size, sets, seed=3)
    folder = run / "checkpoints" / "mstep-1" / "final"
    checkpoint.save(folder, network, runtime, {"step": 9, **identity_of(tokenizer)})

    export_hf(folder, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    assert config.items() >= ids.items() and config["torch_dtype"] == "float32" and config["tie_word_embeddings"]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()).items() >= ids.items()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    row = torch.tensor([tokenizer.encode(TEXT)])
    found = logits(network, runtime, row)
    assert found is not None
    with torch.no_grad():
        assert_close(found[..., : tokenizer.vocab_size], hf(row).logits)
    assert (
        load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == tokenizer.vocab_size
    )

    check = Check(tmp_path / "hf", folder)
    assert not check.tensors().different and check.logits(runtime).passes

    other = train_sentencepiece([TEXT * 5], 290, tmp_path / "other")
    checkpoint.save(folder, network, runtime, identity_of(other))
    with pytest.raises(UserError, match="final: was trained with another tokenizer than the one in"):
        export_hf(folder, tmp_path / "again")


def test_a_model_that_came_from_hugging_face(tmp_path: Path, runtime: Runtime) -> None:
    """A run keeps the small files of the folder that it started from; an export has them, but for the data type."""
    hf = make("llama", tmp_path / "hf", torch.bfloat16, tokenizer=True)
    import_hf(hf, tmp_path / "base", "fp32")
    run = tmp_path / "run"
    keep_small_files(hf, run / RUN_FOLDER)
    (run / "config.yaml").write_text(dump_config(RunConfig()))  # not looked at
    network = load(tmp_path / "base", hf, SINGLE, runtime)
    folder = run / "checkpoints" / "mstep-1" / "final"
    checkpoint.save(folder, network, runtime, {"step": 9})
    shutil.rmtree(hf)

    export_hf(folder, tmp_path / "back")
    config, kept = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", run / RUN_FOLDER))
    assert kept["dtype"] == "bfloat16" and config == kept | {"dtype": "float32"}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (run / RUN_FOLDER / name).read_bytes()
    export_hf(folder, tmp_path / "half", dtype="bf16")
    assert (tmp_path / "half" / "config.json").read_bytes() == (run / RUN_FOLDER / "config.json").read_bytes()
