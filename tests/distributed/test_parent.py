"""Data-parallel ranks share out the reading of the checkpoint that a run starts from; all get the same bits."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from tests.helpers.forked import run_job
from tests.helpers.megatron import fingerprint
from tests.helpers.training import bytes_read, train_words


def measure_loading(directory: Path) -> None:
    """Let each rank write how much it read of the weights, and the fingerprints of its parameters."""
    from mixmoe_megatron.training import startup

    load, load_parent, read = TorchDistLoadShardedStrategy.load, startup.load_parent, []

    def measured(self: TorchDistLoadShardedStrategy, *args: Any) -> Any:
        before = bytes_read()
        loaded = load(self, *args)
        read.append(bytes_read() - before)
        return loaded

    def told(chunks: list[Any], **where: Any) -> list[Any]:
        load_parent(chunks, **where)
        found = {"read": sum(read), "weights": fingerprint(chunks)}
        (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return chunks

    TorchDistLoadShardedStrategy.load = measured
    startup.load_parent = told


def load(world: Path, logs: Path, flags: str, processes: int) -> list[dict[str, Any]]:
    """Start stage 1 with these flags, up to the report of what trains."""
    logs.mkdir()
    words = train_words(1, world / "upcycled", world / "mono", None, 1, f"{flags} --dry-run")
    run_job(words, processes, logs / "job", prelude=partial(measure_loading, logs))
    return [json.loads((logs / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(
    "flags", ["", pytest.param("--context-parallel-size 2", marks=pytest.mark.slow)], ids=["DP2", "CP2"]
)
def test_replicas_read_each_byte_once(world: Path, tmp_path: Path, flags: str) -> None:
    (one,) = load(world, tmp_path / "one", "", 1)
    two = load(world, tmp_path / "two", flags, 2)
    assert [rank["weights"] for rank in two] == [one["weights"]] * 2
    for rank in two:
        assert 0.4 * one["read"] < rank["read"] < 0.6 * one["read"]  # beside the weights, each reads the index
