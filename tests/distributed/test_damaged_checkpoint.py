"""A run does not start on a damaged checkpoint; the flag that its message names takes it back and on to the end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from mixmoe_megatron.checkpoint.health import find_damage
from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE
from mixmoe_megatron.cli import EXIT_BAD_INPUT
from tests.helpers.forked import Job, run_job
from tests.helpers.training import checkpoint_tensors, train_words


def refused(words: list[str], logs: Path) -> str:
    """Run a command that must end with status 2, and return its one sentence."""
    job = Job(words, 1, logs)
    assert job.wait() == [EXIT_BAD_INPUT], job.output()[-8000:]
    assert "Traceback" not in job.output()
    return next(line for line in job.output().splitlines() if line.startswith("error: "))


def test_back_to_the_iteration_before_and_on_to_the_end(world: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    words = train_words(1, world / "upcycled", world / "mono", save, 8, "--save-interval 2")
    run_job([*words, "--exit-interval", "6"], 1, tmp_path / "first")
    file = save / "iter_0000006" / "__0_0.distcp"
    os.truncate(file, 1000)

    sentence = refused(words, tmp_path / "refused")
    assert f"{file} is truncated" in sentence
    assert "The newest other one that is whole is iter_0000004: --ckpt-step 4 chooses it." in sentence

    job = run_job([*words, "--ckpt-step", "4"], 1, tmp_path / "back")
    assert "at iteration 4\n" in job.stdout(0)
    assert all(find_damage(save / f"iter_000000{number}", full=True) is None for number in (2, 4, 6, 8))

    undisturbed = train_words(1, world / "upcycled", world / "mono", tmp_path / "undisturbed", 8)
    run_job(undisturbed, 1, tmp_path / "logs")
    expected = checkpoint_tensors(tmp_path / "undisturbed")
    for name, tensor in checkpoint_tensors(save).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)

    (save / TRACKER_FILE).write_text("")
    assert f"`echo 8 > {save / TRACKER_FILE}` chooses it" in refused(words, tmp_path / "empty")
    (save / TRACKER_FILE).write_text("8\n")
    job = run_job(words, 1, tmp_path / "finished")
    assert "holds iteration 8: nothing is left to train" in job.output()


def test_a_damaged_parent_is_refused(world: Path, tmp_path: Path) -> None:
    parent = shutil.copytree(world / "upcycled", tmp_path / "upcycled")
    file = next((parent / "release").glob("*.distcp"))
    os.truncate(file, 100)
    sentence = refused(train_words(1, parent, world / "mono", tmp_path / "run", 2), tmp_path / "logs")
    assert str(file) in sentence
    assert not (tmp_path / "run").exists()
