"""Bits and tensors share memory; values that are not finite are found by their bits."""

from __future__ import annotations

import pytest
import torch

from mixmoe_megatron.conversion.bits import (
    FLOAT_DTYPES,
    ITEMSIZE,
    bits_type,
    count_not_finite,
    dtype_name,
    from_torch,
    to_torch,
)


@pytest.mark.parametrize("name", ITEMSIZE)
def test_there_and_back(name: str) -> None:
    dtype = getattr(torch, name)
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    bits = from_torch(tensor)
    assert dtype_name(dtype) == name and bits.dtype == bits_type(name) and bits.shape == (3, 4)
    assert bits.ctypes.data == tensor.data_ptr()
    again = to_torch(bits[1:, ::2], name)
    assert again.dtype == dtype and again.tolist() == tensor[1:, ::2].tolist()
    assert from_torch(tensor.T).tolist() == bits.T.tolist()


@pytest.mark.parametrize("name", FLOAT_DTYPES)
def test_values_that_are_not_finite(name: str) -> None:
    dtype = getattr(torch, name)
    limits = torch.finfo(dtype)
    finite = torch.tensor(
        [0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, 1.5], dtype=dtype
    )
    assert count_not_finite(from_torch(finite), name) == 0
    wrong = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")], dtype=dtype)
    assert count_not_finite(from_torch(torch.cat((finite, wrong)).reshape(1, -1)), name) == 4
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    if ITEMSIZE[name] == 2:
        values = every.view(dtype)
        assert count_not_finite(from_torch(values), name) == int((~values.isfinite()).sum())
