"""Training from and to Hugging Face directories gives what the conversion commands give, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmoe_megatron.metadata import read_metadata, weights_sha256
from tests.helpers.conversion import run_conversion
from tests.helpers.training import checkpoint_tensors, train

LAYOUTS = {
    "one process": ("", 1),
    "TP2xEP2": ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --sequence-parallel", 2),
    "PP2": ("--pipeline-model-parallel-size 2", 2),
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
        "path": str(world / "base"), "stage": "dense", "weights_sha256": weights_sha256(world / "base")
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
