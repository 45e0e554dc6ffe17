"""A disk that fills up in a save: one sentence, the earlier checkpoint untouched, and with room the run goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint.health import find_damage
from mixmoe_megatron.checkpoint.megatron_checkpoint import iteration_directory
from tests.helpers.crashes import file_size_limit_from, full_disk_from
from tests.helpers.forked import Job, run_job
from tests.helpers.training import train_words

POINTS = {
    "tensors of rank 0": (0, "iter_0000004/__0_0.distcp"),
    "tensors of rank 1": (1, "iter_0000004/__1_0.distcp"),
    "metadata": (0, "iter_0000004/.metadata.tmp"),
    "format": (0, "iter_0000004/metadata.json"),
}


def words(world: Path, save: Path) -> list[str]:
    extra = "--expert-model-parallel-size 2 --save-interval 2"
    return train_words(1, world / "upcycled", world / "mono", save, 6, extra)


def assert_told(job: Job, rank: int, reason: str, save: Path, newest: str) -> None:
    """Check that a rank ended with one sentence, and that the tracker names a whole iteration."""
    assert 2 in job.wait(), job.output()[-8000:]
    error = (job.logs / f"{rank}.err").read_text("utf-8")
    assert f"error: saving to {save} failed: " in error
    assert reason in error
    assert f"{newest} in {save} is saved, and the same command goes on from there." in error
    assert "Traceback" not in error
    assert iteration_directory(save).name == newest
    assert find_damage(save / newest, full=True) is None


def full_disk_test(world: Path, tmp_path: Path, rank: int, reason: str, prelude: Callable[[], None]) -> None:
    save = tmp_path / "run"
    job = Job(words(world, save), 2, tmp_path / "full", prelude=prelude)
    assert_told(job, rank, reason, save, "iter_0000002")
    job = run_job(words(world, save), 2, tmp_path / "room")
    assert "at iteration 2\n" in job.stdout(0)
    assert find_damage(iteration_directory(save, 6), full=True) is None


def test_a_file_that_the_system_cuts_off(world: Path, tmp_path: Path) -> None:
    prelude = file_size_limit_from(tmp_path / "run", 1, "iter_0000004/__1_0.distcp", 100_000)
    full_disk_test(world, tmp_path, 1, "File too large", prelude)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_no_space_at_each_file_of_a_save(world: Path, tmp_path: Path, point: str) -> None:
    rank, path = POINTS[point]
    full_disk_test(world, tmp_path, rank, "No space left on device", full_disk_from(tmp_path / "run", rank, path))


def test_no_space_for_the_tracker_file(world: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    tracker = ".latest_checkpointed_iteration.txt"
    job = Job(words(world, save), 2, tmp_path / "full", prelude=full_disk_from(save, 0, tracker))
    assert 2 in job.wait()
    assert "No space left on device" in job.output()
    assert "nothing has been saved" in job.output()
    run_job(words(world, save), 2, tmp_path / "room")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.8 MB, where this machine lets tests mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_full(world: Path, small_disk: Path, tmp_path: Path) -> None:
    save = small_disk / "run"
    job = Job(words(world, save), 2, tmp_path / "full")
    job.wait()
    rank = 0 if "No space" in (job.logs / "0.err").read_text("utf-8") else 1
    assert_told(job, rank, "No space left on device", save, "iter_0000004")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run_job(words(world, save), 2, tmp_path / "room")
    assert find_damage(iteration_directory(save, 6), full=True) is None
