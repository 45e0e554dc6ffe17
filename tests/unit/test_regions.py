"""A region of a Megatron tensor is read from its own slices alone, and equals that part of the whole."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmoe_megatron.conversion.hf_import import ImportRequest, read_hf_model
from mixmoe_megatron.conversion.mappings import TABLES, Sizes
from mixmoe_megatron.conversion.plan import LazyTensor, expand, make_plan
from mixmoe_megatron.conversion.regions import Region
from mixmoe_megatron.conversion.safetensors_io import SINGLE_FILE, SafetensorsReader
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.conversion import base_fields
from tests.helpers.mappings import CONTEXT, DENSE, MOE, Memory, random_hf
from tests.helpers.tiny_hf import save_tiny_dense

UPCYCLED = replace(MOE, num_groups=1)
CASES = {
    "dense": (DENSE, "same"),
    "exact vocabulary": (replace(DENSE, padded_vocab_size=10), "same"),
    "stage 1": (UPCYCLED, "same"),
    "stage 2": (MOE, "same"),
    "upcycled": (UPCYCLED, "upcycle"),
    "copies": (replace(UPCYCLED, expert_init="copy", moe_ffn_hidden_size=12), "upcycle"),
}


class SlicedMemory(Memory):
    """Tensors in memory of which only regions may be read, the values counted."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.values_read = 0

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"all of {name} is read")

    def read_region(self, name: str, region: Region) -> Tensor:
        values = self.tensors[name][region]
        assert values.shape == tuple(cut.stop - cut.start for cut in region)
        self.values_read += values.numel()
        return values


def plans(sizes: Sizes, table: str, dtype: str) -> tuple[SlicedMemory, list[LazyTensor], list[LazyTensor]]:
    """The same plan twice: from slices, and from whole tensors."""
    tensors = random_hf(DENSE if table == "upcycle" else sizes).tensors
    source, units = SlicedMemory(tensors), expand(TABLES[table], sizes)
    whole = make_plan(units, Memory(tensors), sizes, CONTEXT, "megatron", dtype)
    return source, make_plan(units, source, sizes, CONTEXT, "megatron", dtype), whole


def random_region(shape: tuple[int, ...], generator: torch.Generator) -> Region:
    ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in shape]
    return tuple(slice(*pair) for pair in ends)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_any_region_is_that_part_of_the_whole(case: str, dtype: str) -> None:
    source, sliced, whole = plans(*CASES[case], dtype)
    generator = torch.Generator().manual_seed(0)
    for part, other in zip(sliced, whole, strict=True):
        expected = other.read()
        everything = tuple(slice(0, size) for size in part.shape)
        for region in [everything, *(random_region(part.shape, generator) for _ in range(12))]:
            source.values_read = 0
            found = part.part(region)
            assert found.dtype == expected.dtype and torch.equal(found, expected[region]), (part.name, region)
            assert source.values_read <= found.numel(), (part.name, region)


def test_rows_beyond_the_vocabulary_are_left_out() -> None:
    source, sliced, _ = plans(DENSE, "same", "keep")
    embedding = sliced[0]
    assert embedding.part((slice(12, 20), slice(0, 8))).shape == (4, 8) and source.values_read == 0
    assert embedding.part((slice(16, 24), slice(0, 8))).shape == (0, 8)


class WholeMemory(Memory):
    """Tensors in memory of which no region may be read."""

    def read_region(self, name: str, region: Region) -> Tensor:
        raise AssertionError(f"only a part of {name} is read")


def test_values_to_be_checked_are_read_whole() -> None:
    source = WholeMemory(random_hf(DENSE).tensors)
    source.tensors["model.norm.weight"][0] = float("nan")
    plan = make_plan(expand(TABLES["same"], DENSE), source, DENSE, CONTEXT, "megatron", check_finite=True)
    (norm,) = (tensor for tensor in plan if tensor.name == "decoder.final_layernorm.weight")
    with pytest.raises(MixMoEError, match=r"model\.norm\.weight holds 1 values"):
        norm.part((slice(4, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_give_any_region(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {str(n): torch.randn([5, 7, 3, 4][:n]).to(dtype) for n in range(5)}
    save_file(tensors, str(tmp_path / SINGLE_FILE))
    reader, generator = SafetensorsReader(tmp_path), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        for region in [random_region(tuple(tensor.shape), generator) for _ in range(30)]:
            assert torch.equal(reader.read_region(name, region), tensor[region])
    (tmp_path / SINGLE_FILE).write_bytes((tmp_path / SINGLE_FILE).read_bytes()[:-8])  # after it was opened
    with pytest.raises(MixMoEError, match=r"cannot be read from .* \(it ends too early\)"):
        [reader.read(name) for name in tensors]


def test_contiguous_bytes_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"matrix": torch.randn(6, 8)}, str(tmp_path / SINGLE_FILE))
    reader, pread, sizes = SafetensorsReader(tmp_path), os.preadv, []

    def counted(file: int, buffers: list[memoryview], position: int) -> int:
        sizes.append(pread(file, buffers, position))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    reader.read("matrix")
    reader.read_region("matrix", (slice(2, 4), slice(0, 8)))
    reader.read_region("matrix", (slice(1, 4), slice(4, 8)))
    assert sizes == [6 * 8 * 4, 2 * 8 * 4, *[4 * 4] * 3]


def test_a_stored_copy_of_the_embedding_is_compared_where_it_is_read(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path, tied=True, tokenizer=None, **base_fields("llama"))
    weights = load_file(tmp_path / SINGLE_FILE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][300, 7] += 1
    save_file(weights, tmp_path / SINGLE_FILE)
    embedding = read_hf_model(ImportRequest(str(tmp_path), output_dir="")).plan[0]
    whole_rows = slice(0, 32)
    assert torch.equal(embedding.part((slice(0, 256), whole_rows)), weights["model.embed_tokens.weight"][:256])
    for read in (embedding.read, lambda: embedding.part((slice(256, 512), whole_rows))):
        with pytest.raises(MixMoEError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            read()
