"""Megatron-Core 0.16.1 on CPU and gloo: everything that has to change, in one place.

Active only where CUDA is not available, and before `megatron.core` is imported (`install` refuses to come later).

What changes, and why:

- `torch.cuda` calls (current_device, synchronize, streams, memory counters, RNG state) raise on a CPU build:
  stand-ins answer for the CPU.
- `Tensor.cuda()` is the identity (tied embeddings under pipeline parallelism call it).
- `"cuda"` and `"torch.cuda.*Tensor"` literals in schedules, optimizers, gradient clipping and masks are rewritten to
  CPU in the modules' code objects at import: no cost at run time.
- `@jit_fuser` (torch.compile) is a no-op during the import, else each process compiles for 10 s.
- The CUDA RNG tracker keeps the states of the CPU default generator.
- Gathering and reduce-scattering shares of unequal size (tokens of experts that are split by tensors) pads them:
  gloo knows equal sizes only.
- Rotary positions under context parallelism do without `pin_memory=True`, which CPU builds refuse.

Other fixes concern GPUs, too, and are always applied: the first where layers are Megatron-Core's own, the others where
Transformer Engine is missing.

- `WrappedTorchNorm` refuses sequence parallelism. Here it marks its parameters `sequence_parallel`, so that their
  gradients are reduced.
- The last norm is apex's where that is installed, and apex's is no RMSNorm: it is torch's.
- Recomputing norms: "no FP8" is passed on as False, taken for "FP8", and a name of Transformer Engine is missing.
- MoE: `te_general_gemm` is a name left undefined without Transformer Engine.
- The distributed optimizer, when it is loaded, looks for the `step` of torch's Adam among the loaded tensors: KeyError.
  (`mcore.optimizer_state` does the rest of what goes wrong there: with Megatron's own functions all parameters would
  share ONE step tensor afterwards, which counts up once per parameter.)
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
    "torch.cuda.DoubleTensor": "torch.DoubleTensor",
}
_GPU_ONLY = (
    "megatron.core.transformer.cuda_graphs",
    "megatron.core.full_cuda_graph",
    "megatron.core.nccl_allocator",
    "megatron.core.resharding",
    "megatron.core.distributed.fsdp",
)
"""Modules that never run on a CPU: their literals stay."""

_installed = False


def install() -> None:
    """Prepare Megatron-Core for this machine. Idempotent; RuntimeError if megatron.core was imported before."""
    global _installed
    if _installed:
        return
    if any(name == "megatron.core" or name.startswith("megatron.core.") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before ra3_megatron.mcore: import ra3_megatron.mcore first")
    if not torch.cuda.is_available():
        _stand_in_for_cuda()
    sys.meta_path.insert(0, _Finder())
    _installed = True


# -- rewriting modules while they are imported ------------------------------------------------------------------------


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module of Megatron-Core with its CUDA literals rewritten, then applies that module's fixes."""

    def __init__(self, inner: importlib.machinery.SourceFileLoader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        code = self.inner.get_code(name)
        if torch.cuda.is_available() or code is None:
            self.inner.exec_module(module)
        else:
            if not name.startswith(_GPU_ONLY):
                code = _rewrite(code)
            with _without_compile():
                exec(code, module.__dict__)
        for fix in _FIXES.get(name, ()):
            fix(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _rewrite(constant: Any) -> Any:
    if isinstance(constant, str):
        return _LITERALS.get(constant, constant)
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_rewrite(item) for item in constant)
    if isinstance(constant, types.CodeType):
        constants = tuple(_rewrite(item) for item in constant.co_consts)
        same = all(new is old for new, old in zip(constants, constant.co_consts, strict=True))
        return constant if same else constant.replace(co_consts=constants)
    return constant


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    original = torch.compile

    def identity(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else (lambda inner: inner)

    torch.compile = identity  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


# -- torch.cuda -------------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True


class _Stream:
    """Work on a CPU is in order already: waiting for a stream waits for nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.set_stream = lambda _: None
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


# -- fixes of single modules ------------------------------------------------------------------------------------------


def _fix_random(module: Any) -> None:
    if torch.cuda.is_available():
        return
    module._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    default = module._MODEL_PARALLEL_RNG_TRACKER_NAME

    class CpuRNGStatesTracker(module.CudaRNGStatesTracker):
        """States of the CPU default generator, switched in and out of it."""

        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_:
                raise ValueError(f"seed {seed} already exists")
            if name in self.states_:
                raise ValueError(f"rng state {name} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = default) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"rng state {name} is not added")
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[outer_name] if outer_name != "default-rng" else outer)
                self._current_state_name = outer_name

    module.CudaRNGStatesTracker = CpuRNGStatesTracker
    seed_cuda = module.model_parallel_cuda_manual_seed

    def model_parallel_cuda_manual_seed(seed: int, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)  # on a CPU the default generator is the data-parallel one
        return seed_cuda(seed, *args, **kwargs)

    module.model_parallel_cuda_manual_seed = model_parallel_cuda_manual_seed


def _fix_recompute(module: Any) -> None:
    if module.HAVE_TE:
        return
    checkpoint = module.CheckpointWithoutOutput
    original = checkpoint.__init__

    def initialize(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    checkpoint.__init__ = initialize


def _fix_norm(module: Any) -> None:
    class WrappedTorchNorm:
        """torch's LayerNorm or RMSNorm, also under sequence parallelism."""

        def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
            if config.layernorm_zero_centered_gamma or config.memory_efficient_layer_norm:
                raise ValueError("zero-centered or memory-efficient norms need Transformer Engine or apex")
            kind: Any = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
            norm = kind(hidden_size, eps=eps).to(config.params_dtype)
            for parameter in norm.parameters():  # finalize_model_grads reduces these over the tensor-parallel group
                parameter.sequence_parallel = config.sequence_parallel
            return norm

    module.WrappedTorchNorm = WrappedTorchNorm


def _fix_block(module: Any) -> None:
    if module.HAVE_APEX and not module.HAVE_TE:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        module.LayerNormImpl = WrappedTorchNorm


def _fix_rope(module: Any) -> None:
    if torch.cuda.is_available():
        return

    def get_pos_emb_on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
        size, rank = cp_group.size(), cp_group.rank()
        index = torch.tensor([rank, 2 * size - rank - 1], device=pos_emb.device)
        chunks = pos_emb.view(*pos_emb.shape[:seq_dim], 2 * size, -1, *pos_emb.shape[seq_dim + 1 :])
        mine = chunks.index_select(seq_dim, index)
        return mine.view(*mine.shape[:seq_dim], -1, *mine.shape[seq_dim + 2 :])

    module.get_pos_emb_on_this_cp_rank = get_pos_emb_on_this_cp_rank


def _fix_mappings(module: Any) -> None:
    if torch.cuda.is_available():
        return
    gather_equal, scatter_equal = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather_equal(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        shares = gather_equal(_padded(input_, max(sizes)), group).chunk(len(sizes))
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    def scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter_equal(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        shares = torch.cat([_padded(share, max(sizes)) for share in input_.split(sizes)])
        return scatter_equal(shares, group)[: sizes[group.rank()]]

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather, scatter


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - values.shape[0]
    return values if missing == 0 else torch.cat([values, values.new_zeros(missing, *values.shape[1:])])


def _fix_moe(module: Any) -> None:
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None
    if torch.cuda.is_available():
        return

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _fix_distributed_optimizer(module: Any) -> None:
    if module.HAVE_APEX_OR_TE:
        return

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":
                target.copy_(tensors[key])

    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states


_FIXES: dict[str, tuple[Any, ...]] = {
    "megatron.core.tensor_parallel.mappings": (_fix_mappings,),
    "megatron.core.tensor_parallel.random": (_fix_random, _fix_recompute),
    "megatron.core.transformer.torch_norm": (_fix_norm,),
    "megatron.core.transformer.transformer_block": (_fix_block,),
    "megatron.core.models.common.embeddings.rope_utils": (_fix_rope,),
    "megatron.core.transformer.moe.moe_utils": (_fix_moe,),
    "megatron.core.optimizer.distrib_optimizer": (_fix_distributed_optimizer,),
}
