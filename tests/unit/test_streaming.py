"""Reading ahead keeps the order and the errors; a file's bytes are all on the disk, or its error is raised."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.conversion import streaming
from mixmoe_megatron.conversion.plan import LazyTensor
from mixmoe_megatron.conversion.safetensors_io import write_safetensors
from mixmoe_megatron.conversion.streaming import DiskFile, write_each
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


def test_a_file_is_written_whole_and_synced_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 3)
    monkeypatch.setattr(streaming, "_SYNC_BYTES", 10)
    synced: list[int] = []
    monkeypatch.setattr(streaming.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with DiskFile(tmp_path / "file") as file:
        assert file.write(b"0123456789ab") == 12
        assert file.write(torch.tensor([0x64636261], dtype=torch.int32).numpy(), 20) == 4 and file.tell() == 24
    assert (tmp_path / "file").read_bytes() == b"0123456789ab" + bytes(8) + b"abcd"
    assert len(synced) >= 2 and synced[-1] == 24


@pytest.mark.parametrize("sync_bytes", [1, 1 << 20])  # it fails while the file grows, or at its end
def test_a_disk_that_fails_to_sync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_bytes: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(streaming, "_SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(streaming.os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is broken"), DiskFile(tmp_path / "file") as file:
        file.write(b"some bytes")
