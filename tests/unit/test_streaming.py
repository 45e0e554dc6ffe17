"""Reading ahead keeps the order and the errors; a file gets all its bytes."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.conversion import streaming
from mixmoe_megatron.conversion.plan import LazyTensor
from mixmoe_megatron.conversion.safetensors_io import write_safetensors
from mixmoe_megatron.conversion.streaming import open_to_write, write_all, write_each
from mixmoe_megatron.conversion.torch_dist_writer import write_torch_dist
from mixmoe_megatron.errors import MixMoEError


def tensor(number: int, read: list[int], fails: bool = False) -> LazyTensor:
    def values() -> torch.Tensor:
        read.append(number)
        if fails:
            raise MixMoEError(f"tensor {number} is damaged.")
        return torch.full((2,), number)

    return LazyTensor(str(number), (2,), torch.int64, values)


def test_values_come_in_order_and_one_is_read_ahead() -> None:
    read: list[int] = []
    second_read = threading.Event()

    def second() -> torch.Tensor:
        second_read.set()
        return torch.ones(2)

    plan = [tensor(0, read), LazyTensor("1", (2,), torch.float32, second), *(tensor(k, read) for k in (2, 3))]
    given: list[tuple[str, int]] = []

    def write(held: LazyTensor, values: torch.Tensor) -> None:
        assert second_read.wait(10)  # before the first is done with
        given.append((held.name, int(values[0])))

    write_each(plan, write)
    assert given == [("0", 0), ("1", 1), ("2", 2), ("3", 3)] and read == [0, 2, 3]


@pytest.mark.parametrize("write", ["torch_dist", "safetensors"])
def test_at_most_two_tensors_are_in_memory(tmp_path: Path, write: str) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def read() -> torch.Tensor:
        values = torch.ones(2)
        alive.append(weakref.ref(values.untyped_storage()))
        most.append(sum(one() is not None for one in alive))
        return values

    plan = [LazyTensor(str(k), (2,), torch.float32, read) for k in range(9)]
    gc.disable()  # nobody else may come to the rescue
    try:
        if write == "torch_dist":
            write_torch_dist(tmp_path, plan, {}, stacked_layers=0)
        else:
            write_safetensors(tmp_path, plan, 1000)
    finally:
        gc.enable()
    assert len(most) == 9 and max(most) <= 2


def test_the_error_of_a_damaged_tensor_arrives() -> None:
    read: list[int] = []
    given: list[str] = []
    plan = [tensor(0, read), tensor(1, read, fails=True), tensor(2, read)]
    with pytest.raises(MixMoEError, match="tensor 1 is damaged"):
        write_each(plan, lambda held, _: given.append(held.name))
    assert given == ["0"]


def test_a_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 3)
    with open_to_write(tmp_path / "file") as file:
        assert write_all(file, b"0123456789ab") == 12
        assert write_all(file, torch.tensor([0x64636261], dtype=torch.int32).numpy(), 20) == 4 and file.tell() == 24
    with open_to_write(tmp_path / "file") as file:  # another rank's share
        write_all(file, b"x", 12)
    assert (tmp_path / "file").read_bytes() == b"0123456789abx" + bytes(7) + b"abcd"
