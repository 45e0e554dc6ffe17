"""Training from and to Hugging Face directories gives what the conversion commands give, to the bit."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmoe_megatron.checkpoint.fingerprint import weights_xxh128
from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.hf_import import open_weights
from mixmoe_megatron.training.hf_directories import HfLoadStrategy
from tests.helpers.conversion import load_weights_of, run_conversion
from tests.helpers.forked import run_job
from tests.helpers.training import bytes_read, checkpoint_tensors, train, train_words

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
        "path": str(world / "base"), "phase": "dense", "weights_xxh128": weights_xxh128(open_weights(world / "base"))
    }  # fmt: skip
    assert [entry["phase"] for entry in metadata.data] == ["stage1"]
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


def count_opens(directory: Path, told: Path) -> None:
    """Let a process write down how often this package opens each file of a directory for its text or its header."""
    opened: Counter[str] = Counter()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        # os.open, which reads values, tells no mode
        if event == "open" and arguments[1] is not None and str(arguments[0]).startswith(str(directory)):
            callers = [frame.filename for frame in traceback.extract_stack()[:-1] if "/pathlib" not in frame.filename]
            if "/mixmoe_megatron/" in callers[-1]:  # not a library's tokenizer, which looks there too
                opened[Path(arguments[0]).name] += 1
                told.write_text(json.dumps(opened))

    sys.addaudithook(listen)


def test_configuration_and_headers_are_read_once(world: Path, tmp_path: Path) -> None:
    """For the flags, for the weights and for their hash, which the run's metadata keeps."""
    told = tmp_path / "opened.json"
    prelude = partial(count_opens, world / "base", told)
    train(1, world / "base", world / "mono", tmp_path / "stage1", 1, UPCYCLE, prelude=prelude)
    opened = json.loads(told.read_text())
    assert (opened["config.json"], opened["model.safetensors"]) == (1, 1)
    assert read_metadata(tmp_path / "stage1").parent["weights_xxh128"] == weights_xxh128(open_weights(world / "base"))


_DENSE = r"self_attn|embed_tokens|lm_head|layers\.[02]\.mlp"
#: layout -> the tensors whose reading its ranks share out; each reads the others
SHARED_OUT = {
    "one process": ".",
    "TP2": _DENSE,
    "TP2xETP2": f"{_DENSE}|mlp",
    "EP2": ".",
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


def measure_loading(directory: Path) -> None:
    """Let each rank write what it read, the bytes of its tensors in it, and its largest tensors, expected and found."""
    load = HfLoadStrategy.load

    def measured(self: HfLoadStrategy, state: dict[str, Any], *args: Any) -> Any:
        parts = [math.prod(part.local_shape) * part.dtype.itemsize for part in nested_values(state) if _is_read(part)]
        before = bytes_read()
        with _Largest() as largest:
            loaded = load(self, state, *args)
        if parts:
            told = {"read": bytes_read() - before, "share": sum(parts), "largest": largest.found, "part": max(parts)}
            (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
        return loaded

    HfLoadStrategy.load = measured  # type: ignore[method-assign]


def _is_read(part: ShardedTensor) -> bool:
    return ".router." not in part.key  # routers are drawn


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_reads_its_share_only(world: Path, tmp_path: Path, layout: str) -> None:
    """Replicas read different tensors; no tensor on the way is larger than the rank's largest part of one."""
    flags, processes = LAYOUTS[layout]
    words = train_words(1, world / "base", world / "mono", None, 1, f"{flags} --dry-run {UPCYCLE}")
    run_job(words, processes, tmp_path / "logs", prelude=partial(measure_loading, tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    for rank in told:
        assert rank["share"] <= rank["read"] < 1.01 * rank["share"] and rank["largest"] <= rank["part"]
    weights = load_weights_of(world / "base")
    copies = {name: 1 if re.search(SHARED_OUT[layout], name) else processes for name in weights}
    assert sum(rank["share"] for rank in told) == sum(copies[name] * weights[name].nbytes for name in weights)
