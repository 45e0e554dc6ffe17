"""Run stock Megatron on a machine without CUDA.

Megatron-Core 0.19 asks for CUDA devices, streams, events and random states by name. `enable_cpu_mode` puts CPU
stand-ins where those names are looked up, once, before Megatron is initialised. It does nothing when CUDA is there.
Only factory functions and module attributes are replaced, so that an ordinary tensor operation pays nothing.

Source: `torch.cuda`, torch's factories, `megatron.core.tensor_parallel` (random, mappings), the token dispatcher, the
writer of asynchronous checkpoints and `megatron.training.initialize`; what had to be bridged was found by running
megatron-core 0.19.2 over gloo.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._device

from mixmoe_megatron.machine import check_megatron_version
from mixmoe_megatron.megatron_patches.wrapping import wrap

_FACTORIES = (
    "tensor", "as_tensor", "zeros", "ones", "empty", "empty_like", "full", "rand", "randn", "randint", "arange", "eye",
)  # fmt: skip
_CPU = torch.device("cpu")
_C_LIBRARY = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_STEPS_BETWEEN_TRIMS = 8
_steps = itertools.count(1)


class _Stream:
    """A stream or event that is always complete: work on a CPU is synchronous."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = time.perf_counter()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def record(self, *args: Any) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: _Stream) -> float:
        """Milliseconds between the recording of this event and of `end`."""
        return (end._time - self._time) * 1e3

    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def synchronize(self, *args: Any) -> None:
        return None

    wait = wait_event = wait_stream = synchronize


def is_cpu_mode() -> bool:
    """Whether `enable_cpu_mode` has put its stand-ins in place in this process."""
    return torch.cuda.Stream is _Stream


def enable_cpu_mode() -> bool:
    """Make stock Megatron run on this machine's CPU over gloo. Idempotent; inert when CUDA is available.

    Returns:
        True when CPU mode is on after the call, False when CUDA is there and nothing was touched.

    Raises:
        MixMoEError: the installed megatron-core is not the supported one.
    """
    if torch.cuda.is_available():
        return False
    if is_cpu_mode():
        return True
    check_megatron_version()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it for tensor parallelism
    # Transformer Engine's choice; Megatron refuses one that is not --attention-backend's.
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    _keep_freed_memory()
    _replace_cuda_functions()
    # torch.device as a context knows factories by identity and lists them at its first use, once: it must list torch's
    # own, which ours call, or `with torch.device("meta")` makes real tensors (transformers 5 then leaves RoPE unset).
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        wrap(torch, name, _make_on_cpu)
    wrap(torch.Tensor, "type", _type_with_cuda_name)
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    _replace_megatron_functions()
    return True


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors.

    By default it hands every tensor beyond 32 MiB back to the system, and each new one then costs a page fault for 4
    KiB: a third of the time of experts with few tokens, whose gradients are as large as their weights. The price:
    memory that was in use once stays with the process, and fragmentation comes on top; `_train_step` bounds it.
    """
    mallopt = getattr(_C_LIBRARY, "mallopt", None)  # another C library has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _train_step(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Train a step; each eighth, and each where memory is short, gives pages that hold nothing back to the system.

    Sequences of other lengths make tensors of other sizes, which the holes between the kept ones do not fit: full
    fine-tuning of 0.6 billion parameters grew from 12 to 22 GB in 90 steps, copies of its FFNs by 0.5 GB a step. Long
    sequences make such holes within a few steps: with each eighth alone that training outgrew 24 GB at step 355.
    """
    result = train_step(*args, **kwargs)
    malloc_trim = getattr(_C_LIBRARY, "malloc_trim", None)  # another C library has none
    if malloc_trim is not None and (next(_steps) % _STEPS_BETWEEN_TRIMS == 0 or _memory_is_short()):
        malloc_trim(0)
    return result


def _memory_is_short() -> bool:
    """Whether less than a third of the machine's memory is free or can be freed."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    kib = {words[0]: int(words[1]) for words in lines}
    return kib["MemAvailable:"] < kib["MemTotal:"] / 3


def _always(value: Any) -> Callable[..., Any]:
    """A new function that returns `value`: torch.compile refuses one object under two names of torch."""
    return lambda *args, **kwargs: value


def _replace_cuda_functions() -> None:
    properties = types.SimpleNamespace(major=0, minor=0, multi_processor_count=1, total_memory=0, name="cpu")
    stream = _Stream()
    replacements: dict[str, Any] = {
        "is_available": _always(False),  # torch's own asks device_count when Lightning has set its NVML variable
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_capability": _always((0, 0)),
        "get_device_properties": _always(properties),
        "get_device_name": _always("cpu"),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda s: stream if s is None else s,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda state, *a: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "memory_stats": lambda *a: {},
        "is_current_stream_capturing": _always(False),
    }
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
        replacements[name] = getattr(torch, name)
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        replacements[name] = _always(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = _always(0)
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))


def _make_on_cpu(factory: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Call one of torch's factories for the CPU where it is called for CUDA."""
    device = kwargs.get("device")
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        kwargs["device"] = _CPU
    kwargs.pop("pin_memory", None)
    return factory(*args, **kwargs)


def _type_with_cuda_name(tensor_type: Callable[..., Any], self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Name a tensor's type as on a GPU: Megatron's optimizers compare it with "torch.cuda.FloatTensor"."""
    result = tensor_type(self, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def _numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What `maybe_move_tensor_to_cpu` returns for a tensor that is on the CPU already: numpy for split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(
    gather: Callable[..., torch.Tensor],
    shard: torch.Tensor,
    group: Any,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Gather along the first axis as Megatron does, shards of different lengths too: gloo gathers equal ones only."""
    if output_split_sizes is None:
        return gather(shard, group, None, use_global_buffer)
    longest = max(output_split_sizes)
    gathered = gather(_lengthen(shard, longest), group).split(longest)
    return torch.cat([part[:size] for part, size in zip(gathered, output_split_sizes, strict=True)])


def _reduce_scatter_uneven(
    reduce_scatter: Callable[..., torch.Tensor],
    whole: torch.Tensor,
    group: Any,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Reduce and scatter along the first axis as Megatron does, into shards of different lengths too."""
    if input_split_sizes is None:
        return reduce_scatter(whole, group, None, use_global_buffer)
    longest = max(input_split_sizes)
    padded = torch.cat([_lengthen(part, longest) for part in whole.split(input_split_sizes)])
    return reduce_scatter(padded, group)[: input_split_sizes[group.rank()]]


def _lengthen(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Append rows of zeros: [N, ...] -> [length, ...]."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _async_loop(*args: Any, **kwargs: Any) -> None:
    """Run Megatron's process that writes asynchronous checkpoints, a fresh interpreter, in CPU mode too."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    loop = PersistentAsyncCaller.async_loop  # Megatron's own: this process has no stand-ins yet
    enable_cpu_mode()
    loop(*args, **kwargs)


def _replace_megatron_functions() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    with warnings.catch_warnings():  # Megatron's optional packages, on import
        warnings.simplefilter("ignore")
        from megatron.training import training

    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    wrap(mappings, "_gather_along_first_dim", _gather_uneven)
    wrap(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_uneven)
    token_dispatcher.maybe_move_tensor_to_cpu = _numpy_if_asked
    PersistentAsyncCaller.async_loop = staticmethod(_async_loop)
    wrap(training, "train_step", _train_step)
    wrap(training, "initialize_megatron", lambda initialize, *a, **k: initialize(*a, allow_no_cuda=True, **k))
    training.set_jit_fusion_options = _always(None)
