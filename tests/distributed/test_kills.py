"""A run that is killed again and again, in steps and in saves, ends with the weights of the undisturbed run."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from mixmoe_megatron.checkpoint.health import find_damage
from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE, iteration_directory
from tests.helpers.crashes import die_at_change, record_changes
from tests.helpers.forked import Job
from tests.helpers.training import checkpoint_tensors, train_words

EXPERT_PARALLEL = "stage 1, expert parallel 2"
LAYOUTS = {
    EXPERT_PARALLEL: (1, "--expert-model-parallel-size 2"),
    "stage 2, data parallel 2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "stage 1, expert parallel 2, asynchronous saving": (
        1,
        "--expert-model-parallel-size 2 --async-save --use-persistent-ckpt-worker --async-strategy mcore",
    ),
}
_RESUMED = re.compile(r"loading distributed checkpoint from \S+ at iteration (\d+)")


class Run:
    """A training run of two processes that saves every second step, to be started as often as it takes."""

    def __init__(self, world: Path, layout: str, steps: int, directory: Path) -> None:
        stage, extra = LAYOUTS[layout]
        parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
        self.save, self.steps = directory / "run", steps
        self._directory, self._starts = directory, 0
        self._words = train_words(stage, world / parent, world / data, self.save, steps, f"{extra} --save-interval 2")

    def start(self, prelude: Callable[[], None] | None = None) -> Job:
        self._starts += 1
        return Job(self._words, 2, self._directory / f"logs{self._starts}", prelude=prelude)

    def named_iteration(self) -> int:
        """The iteration that the tracker file names, which must be whole; 0 when there is none."""
        if not (self.save / TRACKER_FILE).exists():
            return 0
        directory = iteration_directory(self.save)
        assert find_damage(directory, full=True) is None
        return int(directory.name.removeprefix("iter_"))

    def finish(self) -> None:
        """Start once more, to the end."""
        expected = self.named_iteration()
        job = self.start()
        assert job.wait() == [0, 0], job.output()[-8000:]
        assert_resumed(job, expected)
        assert self.named_iteration() == self.steps


def assert_resumed(job: Job, iteration: int) -> None:
    """Check that a job, where it came to loading a checkpoint at all, took this iteration; 0: it has none."""
    assert set(_RESUMED.findall(job.stdout(0))) <= {str(iteration)}, job.output()[-8000:]


def undisturbed_run(world: Path, layout: str, steps: int, directory: Path) -> Run:
    """A run to the end, with a list of what each rank changed on the disk in the files changes.RANK."""
    run = Run(world, layout, steps, directory)
    job = run.start(record_changes(run.save, directory / "changes"))
    assert job.wait() == [0, 0], job.output()[-8000:]
    return run


def assert_same_weights(run: Run, undisturbed: Run) -> None:
    expected = checkpoint_tensors(undisturbed.save)
    found = checkpoint_tensors(run.save)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def kill_at_points(run: Run, points: list[tuple[int, int]]) -> None:
    """Start a run once for each (rank, number), to be killed just before that rank's change of this number."""
    for rank, number in points:
        expected = run.named_iteration()
        job = run.start(die_at_change(run.save, rank, number))
        codes = job.wait()
        assert codes[rank] == -9, f"rank {rank} lived through change {number}: {codes}\n{job.output()[-8000:]}"
        assert_resumed(job, expected)


def kill_at_times(run: Run, count: int, numbers: random.Random) -> None:
    """Kill one rank or all, in turn, at random moments of a run that is then started again."""
    for turn in range(count):
        expected = run.named_iteration()
        job = run.start()
        wait_for_step(job)
        time.sleep(numbers.uniform(0, 0.3))
        helpers = helper_processes(job)
        job.kill(None if turn % 3 == 2 else turn % 3)
        assert -9 in job.wait() or run.named_iteration() == run.steps, job.output()[-8000:]
        for helper in helpers:  # of asynchronous saving; a cluster's launcher ends them with the job
            with suppress(psutil.NoSuchProcess):
                helper.kill()
        assert_resumed(job, expected)


def helper_processes(job: Job) -> list[psutil.Process]:
    """The processes that the ranks of a job have started."""
    helpers = []
    for process in job.processes:
        with suppress(psutil.NoSuchProcess):
            helpers += psutil.Process(process.pid).children(recursive=True)
    return helpers


def wait_for_step(job: Job) -> None:
    """Wait until a job has logged its first step, or has ended."""
    end = time.monotonic() + 120
    while "elapsed time per iteration" not in job.stdout(1) and any(p.is_alive() for p in job.processes):
        assert time.monotonic() < end, job.output()[-8000:]
        time.sleep(0.005)


def test_a_rank_killed_in_a_save_and_in_a_step(world: Path, tmp_path: Path) -> None:
    """The quick form of the tests below: before the metadata is in place, before a rank's tensors, at a random time."""
    expected = undisturbed_run(world, EXPERT_PARALLEL, 12, tmp_path / "undisturbed")
    changes = (tmp_path / "undisturbed" / "changes.0").read_text("utf-8").splitlines()
    run = Run(world, EXPERT_PARALLEL, 12, tmp_path / "killed")
    kill_at_points(run, [(0, changes.index("os.rename iter_0000004/.metadata.tmp"))])
    assert find_damage(run.save / "iter_0000004") is not None
    assert run.named_iteration() == 2
    kill_at_points(run, [(1, 1)])
    kill_at_times(run, 1, random.Random(3))
    run.finish()
    assert_same_weights(run, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_before_each_change_on_the_disk(world: Path, tmp_path: Path) -> None:
    """From the first directory that a run makes to the tracker file of its third save."""
    expected = undisturbed_run(world, EXPERT_PARALLEL, 60, tmp_path / "undisturbed")
    run = Run(world, EXPERT_PARALLEL, 60, tmp_path / "killed")
    kill_at_points(run, [(0, number) for number in range(26)] + [(1, number) for number in range(4)])
    run.finish()
    assert_same_weights(run, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("stage1")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_at_random_moments(layout: str, world: Path, tmp_path: Path) -> None:
    expected = undisturbed_run(world, layout, 60, tmp_path / "undisturbed")
    run = Run(world, layout, 60, tmp_path / "killed")
    kill_at_times(run, 12, random.Random(layout))
    run.finish()
    assert_same_weights(run, expected)


def test_a_save_leaves_no_helper_process(world: Path, tmp_path: Path) -> None:
    """It would outlive a killed rank."""
    job = Run(world, EXPERT_PARALLEL, 60, tmp_path).start()
    wait_for_step(job)
    while not (tmp_path / "run" / TRACKER_FILE).exists():
        assert job.processes[0].is_alive(), job.output()[-8000:]
        time.sleep(0.005)
    helpers = helper_processes(job)
    job.kill()
    assert not helpers
