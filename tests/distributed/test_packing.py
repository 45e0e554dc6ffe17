"""Training with --pack: padded training, the same on several processes, and a resumed run goes on exactly.

Sequences of 256 tokens hold two or three documents, other ones in each epoch, and a micro-batch holds two sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmoe_megatron.data.packing import PackedDataset
from mixmoe_megatron.data.parallel import ParallelDataset
from tests.distributed.test_n_equals_one import (
    ALLGATHER,
    DISTRIBUTED_OPTIMIZER,
    EP,
    FULL,
    OVERLAP,
    PP,
    SELECTIVE,
    TP,
    VPP,
    assert_frozen_tensors_kept,
)
from tests.helpers.logit_rows import refuse_all_logits
from tests.helpers.training import checkpoint_tensors, make_tiny_world, train

STEPS = 6
SEQ_LENGTH = 256
PACK = f"--pack --seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 8 "

ESSENTIAL = {"TP2 SP": TP, "EP2": EP, "DP2": DISTRIBUTED_OPTIMIZER, "PP2": PP}
SLOW = {
    "TP2 EP2": TP + EP,
    "EP2 allgather": EP + ALLGATHER,
    "TP2 SP, recompute full": TP + FULL,
    "EP2, recompute moe and attention": EP + SELECTIVE + "moe core_attn",
    "DP2, overlap": OVERLAP,
    "VPP2 PP2": VPP,
    "PP2, recompute full": PP + FULL,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after stage 1, with its data."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory)
    train(1, directory / "upcycled", directory / "mono", directory / "stage1", 2)
    return directory


#: losses, gradient norms, final tensors
Run = tuple[list[float], list[float], dict[str, torch.Tensor]]


def packed_run(world: Path, save: Path, flags: str, processes: int = 1) -> Run:
    """Train stage 2; return losses, gradient norms and the final tensors."""
    losses, norms = train(2, world / "stage1", world / "pairs", save, STEPS, flags, processes, refuse_all_logits)
    return losses, norms, checkpoint_tensors(save)


@pytest.fixture(scope="module")
def one_process(world: Path) -> Run:
    return packed_run(world, world / "one", PACK)


def assert_same_run(actual: Run, expected: Run) -> None:
    assert len(expected[0]) == STEPS and min(expected[1]) > 0
    assert actual[0] == pytest.approx(expected[0], abs=1e-5, rel=0)
    assert actual[1] == pytest.approx(expected[1], rel=2e-3)
    for name, tensor in actual[2].items():
        torch.testing.assert_close(tensor, expected[2][name], rtol=1e-4, atol=1e-5, msg=name)


def test_packed_training_is_padded_training(world: Path, tmp_path: Path) -> None:
    """Each step trains on all documents in one micro-batch, packed into a few samples or one in each."""
    documents = ParallelDataset(world / "pairs")
    packs = PackedDataset(documents, 1, SEQ_LENGTH).num_packs
    assert packs <= documents.num_documents / 2
    runs = []
    for name, pack, samples in (("packed", "--pack", packs), ("padded", "", documents.num_documents)):
        sizes = f"--seq-length {SEQ_LENGTH} --micro-batch-size {samples} --global-batch-size {samples}"
        runs.append(packed_run(world, tmp_path / name, f"{pack} {sizes}"))
    assert_same_run(*runs)
    assert_frozen_tensors_kept(world / "stage1", tmp_path / "packed", 2)


@pytest.mark.parametrize("layout", [*ESSENTIAL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_equal_one(world: Path, one_process: Run, layout: str, tmp_path: Path) -> None:
    flags = PACK + (ESSENTIAL | SLOW)[layout]
    assert_same_run(packed_run(world, tmp_path / "run", flags, processes=2), one_process)


def test_a_resumed_run_equals_an_uninterrupted_one(world: Path, one_process: Run, tmp_path: Path) -> None:
    """Three steps are a whole number of no epoch: the second process goes on in the middle of one."""
    save = tmp_path / "run"
    first, _, _ = packed_run(world, save, PACK + "--exit-interval 3")
    then, norms, tensors = packed_run(world, save, PACK)
    assert [len(first), len(then)] == [3, 3]
    assert [*first, then[0], then[2]] == pytest.approx([*one_process[0][:4], one_process[0][5]], abs=2e-6, rel=0)
    assert norms == pytest.approx(one_process[1][3:], rel=1e-3)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, one_process[2][name], rtol=1e-5, atol=1e-6, msg=name)
