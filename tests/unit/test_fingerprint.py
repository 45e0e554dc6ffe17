"""The fingerprint follows names, dtypes, shapes and values, and nothing else: not files, not the order of reading."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from mixmoe_megatron.checkpoint.fingerprint import HashedSource, weights_xxh128
from mixmoe_megatron.checkpoint.ranks import Ranks
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.conversion.hf_import import open_weights
from tests.helpers.conversion import base_fields, run_conversion
from tests.helpers.mappings import CountedMemory, Memory
from tests.helpers.tiny_hf import save_tiny_dense

TENSORS = {"a": torch.arange(60.0).reshape(6, 10), "b": torch.ones(5).bfloat16(), "c": torch.tensor(3.0)}


def fingerprint(**changes: Tensor) -> str:
    return weights_xxh128(Memory({**TENSORS, **changes}))


def test_it_is_what_it_says() -> None:
    values = (TENSORS["a"].numpy(), TENSORS["b"].view(torch.int16).numpy(), TENSORS["c"].numpy())
    a, b, c = (xxhash.xxh128(value.tobytes()).hexdigest() for value in values)
    lines = f"a float32 [6, 10] {a}\nb bfloat16 [5] {b}\nc float32 [] {c}\n"
    assert fingerprint() == xxhash.xxh128(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"a": TENSORS["a"] + 1},
        {"a": TENSORS["a"].reshape(10, 6)},
        {"a": TENSORS["a"].flip(0)},
        {"b": TENSORS["b"].float()},
        {"b": TENSORS["b"].view(torch.float16)},
        {"d": TENSORS["c"]},
    ],
    ids=["value", "shape", "order", "width", "dtype", "name"],
)
def test_every_change_shows(changes: dict[str, Tensor]) -> None:
    assert fingerprint(**changes) != fingerprint()


def rows(start: int, stop: int) -> Region:
    return slice(start, stop), slice(0, 10)


ORDERS: dict[str, list[Region]] = {
    "nothing": [],
    "all": [rows(0, 6)],
    "in order": [rows(0, 2), rows(2, 3), rows(3, 6)],
    "backwards": [rows(3, 6), rows(0, 3)],
    "twice": [rows(0, 6), rows(0, 6), rows(2, 4)],
    "a part": [rows(0, 4)],
    "a part and some of it again": [rows(0, 4), rows(2, 5)],
    "columns": [(slice(0, 6), slice(0, 5)), (slice(0, 6), slice(5, 10))],
}
READ_AGAIN = {"nothing": 60, "backwards": 30, "a part": 20, "a part and some of it again": 20, "columns": 60}


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_read_in_order_is_not_read_again(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr("mixmoe_megatron.checkpoint.fingerprint.BLOCK_BYTES", 40)  # a row
    counted = CountedMemory(TENSORS)
    source = HashedSource(counted)
    for region in ORDERS[order]:
        source.read_region("a", region)
    counted.values_read = 0
    assert source.weights_digest() == fingerprint()
    assert counted.values_read == READ_AGAIN.get(order, 0) + 5 + 1


def test_parts_of_experts_are_in_order_too() -> None:
    """As a large model's experts are read: some rows of one at a time."""
    experts = {"x": torch.randn(3, 4, 5)}
    counted = CountedMemory(experts)
    source = HashedSource(counted)
    for expert in range(3):
        for row in (0, 2):
            source.read_region("x", (slice(expert, expert + 1), slice(row, row + 2), slice(0, 5)))
    assert source.weights_digest() == weights_xxh128(Memory(experts)) and counted.values_read == 60


def test_blocks_smaller_than_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint()
    monkeypatch.setattr("mixmoe_megatron.checkpoint.fingerprint.BLOCK_BYTES", 12)
    source = HashedSource(Memory(TENSORS))
    source.read_region("a", rows(0, 1))
    assert source.weights_digest() == expected


def test_several_threads() -> None:
    values = torch.randn(200, 50)
    source = HashedSource(Memory({"x": values}))

    def read(start: int) -> None:
        for row in range(start, 200):
            source.read_region("x", (slice(row, row + 1), slice(0, 50)))

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 0, 50, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.weights_digest() == weights_xxh128(Memory({"x": values}))


def test_ranks_add_up() -> None:
    """Each rank has read other tensors; the others' digests come from them."""
    one, other = HashedSource(CountedMemory(TENSORS)), HashedSource(CountedMemory(TENSORS))
    one.read_region("a", rows(0, 6))
    other.read_region("b", (slice(0, 5),))

    class Two(Ranks):
        def together(self, work):  # type: ignore[no-untyped-def]
            return [work(), other._complete()]

    assert one.weights_digest(Two()) == fingerprint()


@pytest.mark.parametrize("tied", [False, True])
def test_files_and_stored_copies_do_not_matter(tmp_path: Path, tied: bool) -> None:
    model = save_tiny_dense(tmp_path / "one", "llama", tied, tokenizer=None, **base_fields("llama"))
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # lm_head too
    save_file(state, tmp_path / "one" / "model.safetensors")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    prints = {weights_xxh128(open_weights(tmp_path / name)) for name in ("one", "many")}
    words = ["--hf-dir", tmp_path / "one", "--output-dir", tmp_path / "checkpoint", "--dense"]
    assert run_conversion("hf_to_mixmoe", *words) == 0
    words = ["--checkpoint-dir", tmp_path / "checkpoint", "--output-dir", tmp_path / "back"]
    assert run_conversion("mixmoe_to_hf", *words) == 0
    assert prints == {weights_xxh128(open_weights(tmp_path / "back"))}
