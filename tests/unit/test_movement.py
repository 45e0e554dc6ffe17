"""A region of a tensor is read from its own slices alone, and equals that part of what the layout makes of all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmoe_megatron.checkpoint.bits import to_torch
from mixmoe_megatron.checkpoint.safetensors_io import SINGLE_FILE, SafetensorsReader
from mixmoe_megatron.checkpoint.stored import Region, in_order
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.hf_import import ImportRequest, read_hf_model
from mixmoe_megatron.conversion.plan import Target, Unit, expand, plan_tensors
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import TABLES, Side, Sizes
from mixmoe_megatron.model.router_rows import folded_router, new_router_weight
from tests.helpers.conversion import base_fields
from tests.helpers.mappings import DENSE, MOE, OPTIONS, CountedMemory, random_hf, read_tensor
from tests.helpers.tiny_hf import save_tiny_dense

UPCYCLED = replace(MOE, num_groups=1)
CASES = {
    "dense": (DENSE, "same"),
    "exact vocabulary": (replace(DENSE, padded_vocab_size=10), "same"),
    "stage 1": (UPCYCLED, "same"),
    "stage 2": (MOE, "same"),
    "upcycled": (UPCYCLED, "upcycle"),
    "shared": (replace(UPCYCLED, shared_experts=2, moe_ffn_hidden_size=3), "upcycle"),
    "copies": (replace(UPCYCLED, expert_init="copy", moe_ffn_hidden_size=12), "upcycle"),
}


def sliced_and_whole(
    sizes: Sizes, table: str, to: Side, dtype: str
) -> tuple[CountedMemory, list[tuple[LazyTensor, Tensor]]]:
    """A plan, and what the layouts make of whole tensors."""
    units = expand(TABLES[table], sizes)
    hf = random_hf(DENSE if table == "upcycle" else sizes)
    given, expected = hf.tensors, transformed(units, hf.tensors, sizes, "megatron")
    if to == "hf":
        given, expected = expected, transformed(units, expected, sizes, "hf")
    source = CountedMemory(given)
    plan = plan_tensors(units, source, sizes, Target(to, dtype, OPTIONS))
    assert [tensor.name for tensor in plan] == list(expected)
    return source, [(tensor, expected[tensor.name].to(getattr(torch, tensor.dtype))) for tensor in plan]


def transformed(units: list[Unit], tensors: dict[str, Tensor], sizes: Sizes, to: Side) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for unit in units:
        given = [tensors[name].numpy() for name, _ in unit.tensors("hf" if to == "megatron" else "megatron")]
        move = getattr(unit.row.crossing, f"to_{to}")
        if move is not None:
            made = move(given, sizes)
        elif to == "hf":
            made = [folded_router(given, OPTIONS)]
        else:
            made = [new_router_weight(name, shape, sizes.init_std, 0) for name, shape in unit.megatron]
        named = zip(unit.tensors(to), made, strict=True)
        result.update({name: torch.as_tensor(values, dtype=torch.float32) for (name, _), values in named})
    return result


def random_region(shape: tuple[int, ...], generator: torch.Generator) -> Region:
    ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in shape]
    return tuple(slice(*pair) for pair in ends)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("to", ["megatron", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_any_region_is_that_part_of_the_whole(case: str, to: Side, dtype: str) -> None:
    if CASES[case][1] == "upcycle" and to == "hf":
        pytest.skip("upcycling leads to Megatron only")
    source, tensors = sliced_and_whole(*CASES[case], to, dtype)
    generator = torch.Generator().manual_seed(0)
    for tensor, expected in tensors:
        everything = tuple(slice(0, size) for size in tensor.shape)
        for region in [everything, *(random_region(tensor.shape, generator) for _ in range(12))]:
            source.values_read = 0
            found = tensor.part(region)
            assert found.dtype == expected.dtype and torch.equal(found, expected[region]), (tensor.name, region)
            computed = to == "hf" and tensor.name.endswith("router.weight")  # of all of its row
            assert computed or source.values_read <= found.numel(), (tensor.name, region)


@pytest.mark.parametrize("most", [1, 3, 7, 8, 50, 10_000])
@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_blocks_are_all_bytes_in_order(monkeypatch: pytest.MonkeyPatch, to: Side, most: int) -> None:
    monkeypatch.setattr("mixmoe_megatron.checkpoint.tensors.BLOCK_BYTES", 4 * most)
    _, tensors = sliced_and_whole(MOE, "same", to, "keep")
    for tensor, expected in tensors:
        blocks = [bytes(block) for block in tensor.blocks()]
        assert b"".join(blocks) == expected.contiguous().numpy().tobytes()
        assert all(len(block) <= 4 * most for block in blocks)


def test_regions_in_order() -> None:
    assert list(in_order((), 5)) == [()]
    assert list(in_order((0, 3), 5)) == []
    assert list(in_order((2, 3), 6)) == [(slice(0, 2), slice(0, 3))]
    assert list(in_order((2, 3), 2))[1] == (slice(0, 1), slice(2, 3))
    assert list(in_order((3, 2), 4)) == [(slice(0, 2), slice(0, 2)), (slice(2, 3), slice(0, 2))]


def test_rows_beyond_the_vocabulary_are_left_out() -> None:
    source, tensors = sliced_and_whole(DENSE, "same", "megatron", "keep")
    embedding, _ = tensors[0]
    assert embedding.part((slice(12, 20), slice(0, 8))).shape == (4, 8) and source.values_read == 0
    assert embedding.part((slice(16, 24), slice(0, 8))).shape == (0, 8)


def test_values_are_checked_where_they_are_read() -> None:
    source = random_hf(DENSE)
    source.tensors["model.norm.weight"][0] = float("nan")
    source.tensors["model.norm.weight"][4:6] = 3e38  # finite, though their sum is not
    plan = plan_tensors(expand(TABLES["same"], DENSE), source, DENSE, Target("megatron", check_finite=True))
    (norm,) = (tensor for tensor in plan if tensor.name == "decoder.final_layernorm.weight")
    assert torch.equal(norm.part((slice(4, 8),)), source.tensors["model.norm.weight"][4:])
    with pytest.raises(MixMoEError, match=r"model\.norm\.weight holds values that are NaN"):
        norm.part((slice(0, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_give_any_region(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {str(n): torch.randn([5, 7, 3, 4][:n]).to(dtype) for n in range(5)}
    save_file(tensors, str(tmp_path / SINGLE_FILE))
    reader, generator = SafetensorsReader(tmp_path), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        for region in [random_region(tuple(tensor.shape), generator) for _ in range(30)]:
            assert torch.equal(to_torch(reader.read_region(name, region), reader.dtype(name)), tensor[region])
    (tmp_path / SINGLE_FILE).write_bytes((tmp_path / SINGLE_FILE).read_bytes()[:-8])  # after it was opened
    with pytest.raises(MixMoEError, match=r"cannot be read from .* \(it ends too early\)"):
        [read_tensor(reader, name) for name in tensors]


def test_contiguous_bytes_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"matrix": torch.randn(6, 8)}, str(tmp_path / SINGLE_FILE))
    reader, pread, sizes = SafetensorsReader(tmp_path), os.preadv, []

    def counted(file: int, buffers: list[memoryview], position: int) -> int:
        sizes.append(pread(file, buffers, position))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    reader.read_region("matrix", (slice(0, 6), slice(0, 8)))
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
    with pytest.raises(MixMoEError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        embedding.part((slice(256, 512), whole_rows))
