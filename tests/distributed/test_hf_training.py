"""Training from and to Hugging Face directories gives what the conversion commands give, to the bit."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmoe_megatron.conversion.fingerprint import weights_xxh128
from mixmoe_megatron.conversion.hf_import import open_weights
from mixmoe_megatron.conversion.plan import LazyTensor
from mixmoe_megatron.metadata import read_metadata
from tests.helpers.conversion import load_weights_of, run_conversion
from tests.helpers.forked import run_job
from tests.helpers.training import checkpoint_tensors, train, train_words

LAYOUTS = {
    "one process": ("", 1),
    "TP2": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "TP2xETP2": ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --sequence-parallel", 2),
    "EP2": ("--expert-model-parallel-size 2", 2),
    "PP2": ("--pipeline-model-parallel-size 2", 2),
    "TP2xEP2": ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --sequence-parallel", 2),
}
UPCYCLE = """ --upcycle-options {"moe_every":2}"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(world: Path, tmp_path: Path, layout: str) -> None:
    flags, processes = LAYOUTS[layout]
    both, hf = tmp_path / "stage1", tmp_path / "hf"
    converted, _ = train(1, world / "upcycled", world / "mono", tmp_path / "expected", 3, flags, processes)
    straight, _ = train(1, world / "base", world / "mono", both, 3, f"{flags} --hf-save {hf} {UPCYCLE}", processes)
    assert straight == converted
    expected = checkpoint_tensors(tmp_path / "expected")
    for name, tensor in checkpoint_tensors(both).items():
        assert torch.equal(tensor, expected[name]), name
    metadata = read_metadata(both)
    assert metadata.parent == {
        "path": str(world / "base"), "stage": "dense", "weights_xxh128": weights_xxh128(open_weights(world / "base"))
    }  # fmt: skip
    assert [entry["stage"] for entry in metadata.data] == ["stage1"]
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", both, "--output-dir", tmp_path / "out") == 0
    assert contents(hf / "iter_0000003") == contents(tmp_path / "out")
    assert metadata.data[0]["manifest_sha256"] in (tmp_path / "out" / "README.md").read_text()


def test_stage_2_from_an_exported_stage_1(world: Path, tmp_path: Path) -> None:
    """The exported router is folded, so the numbers differ in the last digits."""
    hf = tmp_path / "hf"
    train(1, world / "upcycled", world / "mono", tmp_path / "stage1", 3, f"--hf-save {hf}")
    expected, _ = train(2, tmp_path / "stage1", world / "pairs", None, 3)
    found, _ = train(2, hf / "iter_0000003", world / "pairs", None, 3, f"--data-cache-path {tmp_path}/cache")
    assert found[0] == pytest.approx(expected[0], abs=1e-5)


def test_stage_0_keeps_a_dense_model_dense(world: Path, tmp_path: Path) -> None:
    assert run_conversion("hf_to_mixmoe", "--hf-dir", world / "base", "--output-dir", tmp_path / "m", "--dense") == 0
    expected, _ = train(0, tmp_path / "m", world / "mono", None, 2)
    found, _ = train(0, world / "base", world / "mono", None, 2, "--tensor-model-parallel-size 2", processes=2)
    assert found == pytest.approx(expected, abs=1e-5)


_DENSE = r"self_attn|embed_tokens|lm_head|layers\.[02]\.mlp"
#: layout -> the tensors that its ranks share out; each has the others whole
SHARED_OUT = {
    "one process": ".",
    "TP2": _DENSE,
    "TP2xETP2": f"{_DENSE}|mlp",
    "EP2": r"layers\.[13]\.mlp",
    "PP2": ".",
    "TP2xEP2": f"{_DENSE}|mlp",
}


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation gives."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = [value for value in tree_leaves(result) if torch.is_tensor(value)]
        self.found = max([self.found, *(value.nbytes for value in given)])
        return result


def bytes_read() -> int:
    """What this process has read so far, by any system call."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure_loading(directory: Path) -> None:
    """Let each rank write what it read, what it got from it, and its largest tensors, expected and found."""
    from mixmoe_megatron.training import startup

    load_from_hf = startup.load_from_hf

    def measured(state: dict[str, Any], plan: list[LazyTensor]) -> dict[str, Tensor]:
        before = bytes_read()
        with _Largest() as largest:
            loaded = load_from_hf(state, plan)
        read = bytes_read() - before
        sizes = [value.nbytes for name, value in loaded.items() if torch.is_tensor(value) and ".router." not in name]
        told = {"read": read, "share": sum(sizes), "largest": largest.found, "parameter": max(sizes)}
        (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
        return loaded

    startup.load_from_hf = measured


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_reads_its_share_only(world: Path, tmp_path: Path, layout: str) -> None:
    """Routers are drawn, all else is read; no tensor on the way is larger than the rank's largest parameter."""
    flags, processes = LAYOUTS[layout]
    words = train_words(1, world / "base", world / "mono", None, 1, f"{flags} --dry-run {UPCYCLE}")
    run_job(words, processes, tmp_path / "logs", prelude=partial(measure_loading, tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    for rank in told:
        assert rank["share"] <= rank["read"] < 1.01 * rank["share"] and rank["largest"] <= rank["parameter"]
    weights = load_weights_of(world / "base")
    copies = {name: 1 if re.search(SHARED_OUT[layout], name) else processes for name in weights}
    assert sum(rank["share"] for rank in told) == sum(copies[name] * weights[name].nbytes for name in weights)
