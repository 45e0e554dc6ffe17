"""A run that stops after three of six steps and goes on later is the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import Run
from tests.helpers.training import checkpoint_tensors, train


@pytest.mark.parametrize("extra", ["", "--use-distributed-optimizer"], ids=["plain", "distributed optimizer"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_world: Path, stage1_run: Run, tmp_path: Path, extra: str
) -> None:
    source, save = (tiny_world / "upcycled", tiny_world / "mono"), tmp_path / "run"
    first, first_norms = train(1, *source, save, 6, f"--exit-interval 3 {extra}")
    then, then_norms = train(1, *source, save, 6, extra)
    assert [len(first), len(then)] == [3, 3]
    assert first_norms + then_norms == pytest.approx(stage1_run.norms, abs=1e-3)
    # Megatron logs in a process's second step the mean of its first two losses.
    expected = [*stage1_run.losses[:4], (stage1_run.losses[3] + stage1_run.losses[4]) / 2, stage1_run.losses[5]]
    assert first + then == pytest.approx(expected, abs=2e-6, rel=0)
    uninterrupted = checkpoint_tensors(stage1_run.directory)
    for name, tensor in checkpoint_tensors(save).items():
        torch.testing.assert_close(tensor, uninterrupted[name], rtol=1e-5, atol=1e-6, msg=name)
