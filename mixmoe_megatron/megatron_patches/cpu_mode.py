"""Run stock Megatron on a machine without CUDA.

Megatron-Core 0.19 asks for CUDA devices, streams, events and random states by name. `enable_cpu_mode` puts CPU
stand-ins where those names are looked up, once, before Megatron is initialised. It does nothing when CUDA is there.
Only factory functions and module attributes are replaced, so that an ordinary tensor operation pays nothing.

Source: none in the paper; what had to be bridged was found by running megatron-core 0.19.2 over gloo.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mixmoe_megatron.machine import check_megatron_version

_FACTORIES = (
    "tensor", "as_tensor", "zeros", "ones", "empty", "empty_like", "full", "rand", "randn", "randint", "arange", "eye",
)  # fmt: skip
_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


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
    return bool(getattr(torch.cuda, "_mixmoe_cpu_mode", False))


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
    _replace_factories()
    _replace_tensor_methods()
    _replace_megatron_functions()
    torch.cuda._mixmoe_cpu_mode = True  # type: ignore[attr-defined]
    return True


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors.

    By default it hands every tensor beyond 32 MiB back to the system, and each new one then costs a page fault for 4
    KiB: a third of the time of experts with few tokens, whose gradients are as large as their weights. The price:
    memory that was in use once stays with the process, and fragmentation comes on top.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _always(value: Any) -> Callable[..., Any]:
    """A new function that returns `value`: torch.compile refuses one object under two names of torch."""
    return lambda *args, **kwargs: value


def _replace_cuda_functions() -> None:
    properties = types.SimpleNamespace(major=0, minor=0, multi_processor_count=1, total_memory=0, name="cpu")
    stream = _Stream()
    replacements: dict[str, Any] = {
        "is_available": lambda: False,  # torch's own asks device_count when Lightning has set its NVML variable
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_capability": lambda *a: (0, 0),
        "get_device_properties": lambda *a: properties,
        "get_device_name": lambda *a: "cpu",
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda s: stream if s is None else s,
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda state, *a: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "memory_stats": lambda *a: {},
        "is_current_stream_capturing": lambda: False,
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        replacements[name] = _always(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = _always(0)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)


def _on_cpu(device: Any) -> Any:
    """`device`, or the CPU where `device` names CUDA."""
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    return _CPU if isinstance(device, torch.device) and device.type == "cuda" else device


def _replace_factories() -> None:
    def wrap(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return on_cpu

    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_with_cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare the type's name with "torch.cuda.FloatTensor".
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_with_cuda_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


def _numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What `maybe_move_tensor_to_cpu` returns for a tensor that is on the CPU already: numpy for split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's gather along the first axis, for shards of different lengths too: gloo gathers equal ones only."""

    def padded_gather(
        shard: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather(shard, group, None, use_global_buffer)
        longest = max(output_split_sizes)
        gathered = gather(_lengthen(shard, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(gathered, output_split_sizes, strict=True)])

    return padded_gather


def _reduce_scatter_uneven(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's reduce-scatter along the first axis, for shards of different lengths too."""

    def padded_reduce_scatter(
        whole: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_scatter(whole, group, None, use_global_buffer)
        longest = max(input_split_sizes)
        padded = torch.cat([_lengthen(part, longest) for part in whole.split(input_split_sizes)])
        return reduce_scatter(padded, group)[: input_split_sizes[group.rank()]]

    return padded_reduce_scatter


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
    def replace(module: str, **functions: Any) -> None:
        for name, function in functions.items():
            setattr(importlib.import_module(f"megatron.{module}"), name, function)

    replace(
        "core.tensor_parallel.random",
        _get_cuda_rng_state=lambda *a, **k: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
    )
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    replace(
        "core.tensor_parallel.mappings",
        _gather_along_first_dim=_gather_uneven(mappings._gather_along_first_dim),
        _reduce_scatter_along_first_dim=_reduce_scatter_uneven(mappings._reduce_scatter_along_first_dim),
    )
    replace("core.transformer.moe.token_dispatcher", maybe_move_tensor_to_cpu=_numpy_if_asked)
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.async_utils").PersistentAsyncCaller
    writer.async_loop = staticmethod(_async_loop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize = importlib.import_module("megatron.training.initialize").initialize_megatron
        replace(
            "training.training",
            initialize_megatron=functools.partial(initialize, allow_no_cuda=True),
            set_jit_fusion_options=_always(None),
        )
