"""Tensors as their bits: numpy arrays of unsigned integers, and the names of their dtypes.

Conversions do without torch, whose import takes longer than to convert some gigabytes: numpy, which lacks bfloat16,
moves the bits, and `to_float32` and `from_float32` are what little arithmetic there is. Training loads through
`to_torch`, which shares memory with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Bits = np.ndarray[Any, Any]

#: Name of a dtype in torch -> bytes of a value.
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
#: dtype of weights -> the bits of its exponent, which are all set in NaN and infinite values alone.
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
FLOAT_DTYPES = tuple(_EXPONENTS)


def bits_type(dtype: str) -> np.dtype[Any]:
    """Return numpy's unsigned integer as wide as a value of a dtype."""
    return np.dtype(f"u{ITEMSIZE[dtype]}")


def all_finite(bits: Bits, dtype: str) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        bits: any shape, of `bits_type(dtype)`.
        dtype: one of FLOAT_DTYPES.
    """
    exponent = bits.dtype.type(_EXPONENTS[dtype])
    return not ((bits & exponent) == exponent).any()


def as_bytes(bits: Bits) -> memoryview:
    """Return the bytes of bits in their order; they share memory if it is contiguous."""
    return memoryview(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))


def to_float32(bits: Bits, dtype: str) -> Bits:
    """Return the values of bits as float32.

    Args:
        bits: any shape, of `bits_type(dtype)`.
        dtype: one of FLOAT_DTYPES.
    """
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(f"f{bits.itemsize}").astype(np.float32, copy=False)


def from_float32(values: Bits, dtype: str) -> Bits:
    """Return float32 values, rounded to the nearest of another dtype (ties to even), as bits.

    Args:
        values: any shape, float32.
        dtype: one of FLOAT_DTYPES.
    """
    if dtype == "float16":
        with np.errstate(over="ignore"):  # what is too large becomes infinite, as in torch
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == "float32":
        return bits
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_torch(bits: Bits, dtype: str) -> Tensor:
    """Return bits as a tensor; they share memory.

    Args:
        bits: any shape, of `bits_type(dtype)`.
        dtype: name in torch.
    """
    import torch

    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, dtype))


def from_torch(tensor: Tensor) -> Bits:
    """Return the bits of a tensor of any shape and dtype, on the CPU; they share memory if it is contiguous."""
    import torch

    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(as_integers).numpy().view(f"u{tensor.element_size()}")
