"""Reading `config.json`: every key is understood, harmless or refused by name; nothing is approximated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

FILE = "config.json"
HARMLESS = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    )
)
"""Keys that change neither the weights' names nor what the model computes from them."""
_ABSENT = object()


class ConfigJson:
    """The content of a `config.json` whose keys are asked for one by one; `close` refuses what nobody asked for."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        """path: what errors call it."""
        self.values = values
        self.path = path
        self._asked: set[str] = set()

    @classmethod
    def read(cls, folder: Path) -> "ConfigJson":
        """That of a Hugging Face folder. Raises UserError when there is none that can be read."""
        path = folder / FILE
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder (give a local Hugging Face folder, with {FILE} in it)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: is no Hugging Face checkpoint (no {FILE})") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: must hold an object")
        return cls(values, str(path))

    def number(self, key: str, default: Any = _ABSENT) -> Any:
        """A number greater than 0. Raises UserError when it is absent (without a default) or no such number."""
        value = self._get(key)
        if value is None:
            if default is _ABSENT:
                raise UserError(f"{self.path}: {key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{self.path}: {key}={_short(value)} must be a number greater than 0")
        return value

    def count(self, key: str, default: Any = _ABSENT) -> Any:
        """An integer greater than 0, or the default."""
        value = self.number(key, default)
        if value is not default and not isinstance(value, int):
            raise UserError(f"{self.path}: {key}={json.dumps(value)} must be an integer")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key}={json.dumps(value)} must be true or false")
        return value

    def require(self, key: str, *allowed: Any, meaning: str) -> None:
        """Refuse any value of `key` but these (absent and null are allowed). meaning: what cannot be represented."""
        value = self._get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{self.path}: {key}={json.dumps(value)} cannot be represented: {meaning}")

    def require_null(self, key: str, default: Any, meaning: str) -> None:
        """Refuse any value of `key` but null, and its absence, which stands for `default` to Hugging Face."""
        if key not in self.values:
            raise UserError(
                f"{self.path}: {key} is missing, which means {json.dumps(default)} to Hugging Face and cannot be "
                f'represented: write "{key}": null if {meaning}'
            )
        self.require(key, meaning=meaning)

    def check(self, key: str, fits: Callable[[Any], bool], meaning: str) -> None:
        """Refuse a value of `key` that does not fit (absent and null are allowed)."""
        value = self._get(key)
        if value is not None and not fits(value):
            raise UserError(f"{self.path}: {key}={json.dumps(value)} cannot be represented: {meaning}")

    def ignore(self, *keys: str) -> None:
        """These have been looked at, or mean nothing here."""
        self._asked.update(keys)

    def rotary(self, default_base: float) -> dict[str, Any]:
        """`rope_base` and `rope_scaling` of the model, of either spelling (`rope_parameters`, `rope_scaling`).

        Raises UserError where both are there and say different things: their readers take one or the other.
        """
        base = self.number("rope_theta", default_base)
        held = {key: self._get(key) for key in ("rope_scaling", "rope_parameters")}
        read = {key: self._rotary_part(key, value, base) for key, value in held.items() if value}
        self._check_original_context(read)
        if len(read) == 2 and read["rope_scaling"] != read["rope_parameters"]:
            raise UserError(
                f"{self.path}: rope_scaling={_short(held['rope_scaling'])} and rope_parameters="
                f"{_short(held['rope_parameters'])} say different things (rope_theta is {base:g} where one names "
                "none): keep the one that is right"
            )
        return next(iter(read.values()), {"rope_base": float(base), "rope_scaling": {"kind": "none"}})

    def _check_original_context(self, read: dict[str, dict[str, Any]]) -> None:
        """Refuse a length beside the object of `llama3` that is not the one in it: transformers 4 takes the one in it,
        transformers 5 the one beside it. Without such an object nobody reads it."""
        beside = self._get("original_max_position_embeddings")
        for key, part in read.items():
            inside = part["rope_scaling"].get("original_context_length", beside)
            if beside is not None and inside != beside:
                raise UserError(
                    f"{self.path}: original_max_position_embeddings={_short(beside)} and {inside} in {key} say "
                    "different things: keep the one that is right"
                )

    def _rotary_part(self, key: str, value: Any, base: float) -> dict[str, Any]:
        """What one of the two objects says. base: where it has no `rope_theta`."""
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {key}={_short(value)} must be an object")
        part = ConfigJson(value, f"{self.path}: {key}")
        kind = part._get("rope_type") or part._get("type") or "default"
        part.ignore("type")
        base = part.number("rope_theta", base)
        part.require("partial_rotary_factor", 1, 1.0, meaning="rotary positions turn all channels")
        scaling: dict[str, Any] = {"kind": "none"}
        if kind == "llama3":
            scaling = {
                "kind": "llama3",
                "factor": float(part.number("factor")),
                "low_freq_factor": float(part.number("low_freq_factor")),
                "high_freq_factor": float(part.number("high_freq_factor")),
                "original_context_length": part.count("original_max_position_embeddings"),
            }
        elif kind == "linear":
            scaling = {"kind": "linear", "factor": float(part.number("factor"))}
        elif kind != "default":
            raise UserError(
                f"{self.path}: {key}.rope_type={json.dumps(kind)} cannot be represented: default, linear and llama3 can"
            )
        part.close()
        return {"rope_base": float(base), "rope_scaling": scaling}

    def close(self) -> None:
        """Refuse every key that was not asked for, is not harmless, and has a value that means something."""
        for key, value in self.values.items():
            if key not in self._asked and key not in HARMLESS and value not in (None, False, 0, "", [], {}):
                raise UserError(f"{self.path}: {key}={_short(value)} is not understood, so it cannot be represented")

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        return self.values.get(key)


def rotary_json(rope_base: float, scaling: dict[str, Any]) -> dict[str, Any]:
    """The keys of a `config.json` for these rotary positions (the inverse of `ConfigJson.rotary`), in the spelling of
    transformers 5 and, where positions are scaled, of transformers 4 too, which does not read the other."""
    values: dict[str, Any] = {"rope_type": "default"}
    if scaling["kind"] != "none":
        values = {"rope_type": scaling["kind"], "factor": scaling["factor"]}
    if scaling["kind"] == "llama3":
        values["low_freq_factor"] = scaling["low_freq_factor"]
        values["high_freq_factor"] = scaling["high_freq_factor"]
        values["original_max_position_embeddings"] = scaling["original_context_length"]
    both = {"rope_theta": rope_base, "rope_parameters": {**values, "rope_theta": rope_base}}
    return both if scaling["kind"] == "none" else {**both, "rope_scaling": values}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "…"
