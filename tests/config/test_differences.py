"""Which keys may change when a run is resumed."""

from ra3_megatron.config.differences import RESULT_FREE, differences, flat
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import VllmConfig

DECIDING = {"rollout.vllm.quantization"}
"""Keys of vLLM's processes that decide which policy samples."""
VLLM = ["rollout.engine=vllm", "model.precision=bf16", "estep.importance_cap=2"]


def test_every_key_of_vllm_is_called_one_or_the_other() -> None:
    keys = {f"rollout.vllm.{key}" for key in VllmConfig.model_fields}
    free = {key for key in RESULT_FREE if key.startswith("rollout.vllm")}
    assert free | DECIDING == keys and not free & DECIDING


def test_a_resumed_run_does_not_begin_to_sample_in_fp8() -> None:
    plain, fp8 = (load_config(None, [*VLLM, f"rollout.vllm.quantization={how}"]) for how in ("none", "fp8"))
    (found,) = differences(plain, fp8)
    assert (found.key, found.one, found.other) == ("rollout.vllm.quantization", "none", "fp8")
    faster = load_config(None, [*VLLM, "rollout.vllm.kv_cache_gib=2", "rollout.vllm.tensor=2"])
    assert differences(plain, faster) == []


def test_every_result_free_name_is_a_key_or_a_section() -> None:
    keys = flat(RunConfig().model_dump())
    for free in RESULT_FREE:
        assert any(f"{key}.".startswith(f"{free}.") for key in keys), free
