"""Bits and tensors share memory; values that are not finite are found by their bits."""

from __future__ import annotations

import pytest
import torch

from mixmoe_megatron.checkpoint.bits import (
    FLOAT_DTYPES,
    ITEMSIZE,
    all_finite,
    bits_type,
    from_float32,
    from_torch,
    to_float32,
    to_torch,
)


@pytest.mark.parametrize("name", ITEMSIZE)
def test_there_and_back(name: str) -> None:
    dtype = getattr(torch, name)
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    bits = from_torch(tensor)
    assert bits.dtype == bits_type(name) and bits.shape == (3, 4)
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
    assert all_finite(from_torch(finite), name) and all_finite(from_torch(finite[:0]), name)
    for wrong in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        assert not all_finite(from_torch(torch.cat((finite, torch.tensor([wrong], dtype=dtype))).reshape(2, 4)), name)
    if ITEMSIZE[name] == 2:
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        assert [all_finite(from_torch(value), name) for value in every] == every.isfinite().tolist()


@pytest.mark.parametrize("name", FLOAT_DTYPES)
def test_values_are_cast_as_torch_casts_them(name: str) -> None:
    dtype = getattr(torch, name)
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    wide = ((bits << 16) | torch.randint(1 << 16, bits.shape, dtype=torch.int32)).view(torch.float32)
    ties = ((bits << 16) | (1 << 15)).view(torch.float32)
    for values in (wide, ties, torch.randn(3, 8)[:, ::2]):
        expected = values.to(dtype)
        found = to_torch(from_float32(values.numpy(), name), name)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
        back = torch.from_numpy(to_float32(from_torch(expected), name))
        assert torch.equal(back.nan_to_num(1.5), expected.float().nan_to_num(1.5))
