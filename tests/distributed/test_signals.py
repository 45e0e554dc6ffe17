"""Ctrl-C ends a run with one sentence; --exit-signal-handler saves first. Both go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE, iteration_directory
from tests.helpers.forked import Job, run_job
from tests.helpers.training import checkpoint_tensors, train, train_words

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a stage 1 that ran to its end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(1, world / "upcycled", world / "mono", directory, STEPS, processes=2)
    return directory


def stopped_run(world: Path, tmp_path: Path, number: signal.Signals, extra: str) -> tuple[Job, list[str]]:
    """Start a run of two processes, send both a signal once something is saved, and wait for its end."""
    save = tmp_path / "run"
    words = train_words(1, world / "upcycled", world / "mono", save, STEPS, f"--save-interval 4 {extra}")
    job = Job(words, 2, tmp_path / "stopped")
    end = time.monotonic() + 120
    while not (save / TRACKER_FILE).exists():
        assert time.monotonic() < end and all(p.is_alive() for p in job.processes), job.output()[-8000:]
        time.sleep(0.01)
    for process in job.processes:
        os.kill(process.pid, number)
    job.wait()
    return job, words


def assert_goes_on(undisturbed: Path, tmp_path: Path, words: list[str]) -> None:
    saved = int(iteration_directory(tmp_path / "run").name.removeprefix("iter_"))
    assert 4 <= saved < STEPS
    job = run_job(words, 2, tmp_path / "resumed")
    assert f"at iteration {saved}\n" in job.stdout(0)
    expected = checkpoint_tensors(undisturbed)
    for name, tensor in checkpoint_tensors(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_ctrl_c_ends_with_a_sentence_that_is_true(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    job, words = stopped_run(world, tmp_path, signal.SIGINT, "")
    assert 130 in [process.exitcode for process in job.processes], job.output()[-8000:]
    newest = iteration_directory(tmp_path / "run").name
    sentence = f"interrupted: {newest} in {tmp_path / 'run'} is saved, and the same command goes on from there."
    assert sentence in job.output()
    assert_goes_on(undisturbed, tmp_path, words)


def test_exit_signal_handler_saves_and_ends_well(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    job, words = stopped_run(world, tmp_path, signal.SIGTERM, "--exit-signal-handler")
    assert [process.exitcode for process in job.processes] == [0, 0], job.output()[-8000:]
    assert "exiting program after receiving SIGTERM" in job.output()
    assert_goes_on(undisturbed, tmp_path, words)
