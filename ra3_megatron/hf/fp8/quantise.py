"""NVIDIA's modelopt at work: calibrate, quantise to FP8 (e4m3), write.

Weights and inputs of every linear layer but the output layer get one scale a tensor (modelopt's `FP8_DEFAULT_CFG`): the
largest magnitude, of the weights or of the inputs seen in calibration, becomes 448, the largest number of e4m3.

Serving engines hold queries, keys and values as one tensor with one scale, and gates and ups as another. Where scales
differ, they turn the numbers back and round them a second time. So such layers share the largest of their scales here:
then what was measured is what is served.
"""

import copy
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ra3_megatron.config.errors import UserError
from ra3_megatron.hf.reference import load_reference

DISTRIBUTION = "nvidia-modelopt"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that serving engines hold as one tensor."""
MULTIPLE = 16
"""FP8 products on GPUs need dimensions that are multiples of this."""
OnStep = Callable[[int], None]
"""Called with the number of tokens of a sequence that is done."""


def modelopt_version() -> str:
    """The installed version. Raises UserError when there is none."""
    if util.find_spec("modelopt") is None:
        raise UserError(
            f"{DISTRIBUTION} is not installed: `make install-modelopt`, or pip install 'ra3-megatron[modelopt]'"
        )
    return metadata.version(DISTRIBUTION)


def load_model(folder: Path, device: str) -> Any:
    """The model of a Hugging Face folder, in fp32 arithmetic: 4 bytes a parameter."""
    return load_reference(folder).to(device)


def quantise(folder: Path, out: Path, rows: Sequence[Sequence[int]], device: str, on_step: OnStep) -> None:
    """Calibrate the model of `folder` on token ids, and write it to `out` in FP8, the rest in bf16.

    Raises UserError for a tensor, or the inputs of a layer, from which no scale follows.
    """
    model = load_model(folder, device)
    _check_sizes(folder, model)
    with _quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        def calibrate(network: Any) -> None:
            with torch.inference_mode():
                for row in rows:
                    network(torch.tensor([list(row)], device=device), use_cache=False)
                    on_step(len(row))

        try:
            model = mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), calibrate)
        except AssertionError as error:  # modelopt's way of saying that it met NaN
            raise UserError(f"{folder}: cannot be calibrated: {error}") from error
        layers = dict(_quantised(model))
        _check_scales(folder, layers)
        _share_scales(layers)
        model.generation_config = type(model.generation_config)()  # the folder's own file is kept beside it
        others = _others(model, {f"{name}.weight" for name in layers})
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=others)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # the library that writes them lets nobody else read them


def _quantised(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with quantised weights, by name."""
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            yield name, module


def _check_sizes(folder: Path, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            for size in module.weight.shape:
                if size % MULTIPLE:
                    raise UserError(
                        f"{folder}: {name}.weight is {list(module.weight.shape)}: FP8 products need multiples of "
                        f"{MULTIPLE}"
                    )


def _check_scales(folder: Path, layers: dict[str, Any]) -> None:
    """UserError unless every largest magnitude is a positive number."""
    for name, module in layers.items():
        for quantizer, what in (
            (module.weight_quantizer, f"{name}.weight"),
            (module.input_quantizer, f"the inputs of {name}"),
        ):
            most = quantizer.amax
            value = float("nan") if most is None else float(most)
            if not 0 < value < float("inf"):
                raise UserError(f"{folder}: no FP8 scale for {what}: its largest magnitude is {value:g}")


def _share_scales(layers: dict[str, Any]) -> None:
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = defaultdict(list)
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        for group in FUSED:
            if last in group:
                groups[parent, group].append(module)
    for modules in groups.values():
        for quantizer in ("weight_quantizer", "input_quantizer"):
            most = torch.stack([getattr(module, quantizer).amax.float() for module in modules]).amax()
            for module in modules:
                getattr(module, quantizer).amax = most


def _others(model: nn.Module, quantised: set[str]) -> dict[str, Tensor]:
    """Parameters that stay what they are, in bf16; tied ones stay one tensor."""
    rounded: dict[int, Tensor] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in quantised:
            found[name] = rounded.setdefault(id(parameter), parameter.detach().to(torch.bfloat16))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """modelopt prints counts, and warns of versions that it was not tested with and packages that it does without."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
