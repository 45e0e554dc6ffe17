"""A run that is killed again and again, in steps and in saves, ends with the weights of the undisturbed run."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from mixmoe_megatron.conversion.checkpoint_health import find_damage
from mixmoe_megatron.conversion.megatron_checkpoint import TRACKER_FILE, iteration_directory
from tests.helpers.crashes import die_at_change, record_changes
from tests.helpers.forked import Job
from tests.helpers.training import checkpoint_tensors, make_tiny_world, train, train_words

STEPS = 24
LAYOUTS = {
    "stage 1, expert parallel 2": (1, "--expert-model-parallel-size 2"),
    "stage 2, data parallel 2, distributed optimizer": (2, "--use-distributed-optimizer"),
}
_RESUMED = re.compile(r"loading distributed checkpoint from \S+ at iteration (\d+)")


class Run:
    """A training run of two processes that saves every second step, to be started as often as it takes."""

    def __init__(self, world: Path, layout: str, directory: Path) -> None:
        stage, extra = LAYOUTS[layout]
        parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
        self.save, self._directory, self.starts = directory / "run", directory, 0
        self._words = train_words(stage, world / parent, world / data, self.save, STEPS, f"{extra} --save-interval 2")

    def start(self, prelude=None) -> Job:
        self.starts += 1
        return Job(self._words, 2, self._directory / f"logs{self.starts}", prelude=prelude)

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
        assert self.named_iteration() == STEPS


def assert_resumed(job: Job, iteration: int) -> None:
    """Check that a job has gone on from this iteration; 0: from its parent."""
    found = _RESUMED.search(job.stdout(0))
    assert (int(found[1]) if found else 0) == iteration or iteration == STEPS, job.output()[-8000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny upcycled model, data, and a stage 1 of four steps."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory)
    train(1, directory / "upcycled", directory / "mono", directory / "stage1", 4)
    return directory


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each layout's run to the end, with a list of what each rank changed on the disk."""
    runs = {}
    for layout in LAYOUTS:
        runs[layout] = run = Run(world, layout, tmp_path_factory.mktemp("undisturbed"))
        job = run.start(record_changes(run.save, run.save.with_name("changes")))
        assert job.wait() == [0, 0], job.output()[-8000:]
    return runs


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
        time.sleep(numbers.uniform(0, 0.4))
        job.kill(None if turn % 3 == 2 else turn % 3)
        assert any(code == -9 for code in job.wait()) or run.named_iteration() == STEPS
        assert_resumed(job, expected)


def wait_for_step(job: Job) -> None:
    """Wait until a job has logged its first step, or has ended."""
    end = time.monotonic() + 120
    while "elapsed time per iteration" not in job.stdout(1) and any(p.is_alive() for p in job.processes):
        assert time.monotonic() < end, job.output()[-8000:]
        time.sleep(0.005)


def save_points(run: Run) -> list[tuple[int, int]]:
    """All (rank, number) of what the undisturbed run changed on the disk up to the end of its second save."""
    points = []
    for rank in (0, 1):
        changes = run.save.with_name(f"changes.{rank}").read_text("utf-8").splitlines()
        end = next(number for number, change in enumerate(changes) if "iter_0000006" in change)
        points += [(rank, number) for number in range(end)]
    return points


def test_a_save_killed_at_four_points(world: Path, undisturbed: dict[str, Run], tmp_path: Path) -> None:
    """The quick form of the test below: before the tensors, the metadata and the tracker file are in place."""
    layout = "stage 1, expert parallel 2"
    run = Run(world, layout, tmp_path)
    changes = (undisturbed[layout].save.with_name("changes.0")).read_text("utf-8").splitlines()
    rename = next(n for n, change in enumerate(changes) if change == "os.rename /iter_0000004/.metadata.tmp")
    kill_at_points(run, [(0, rename)])
    assert find_damage(run.save / "iter_0000004") is not None
    assert run.named_iteration() == 2
    kill_at_points(run, [(1, 1)])
    kill_at_times(run, 1, random.Random(3))
    run.finish()
    assert_same_weights(run, undisturbed[layout])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_before_every_change_on_the_disk(world: Path, undisturbed: dict[str, Run], tmp_path: Path) -> None:
    layout = "stage 1, expert parallel 2"
    points = save_points(undisturbed[layout])
    assert len(points) >= 20
    for number, point in enumerate(points):
        run = Run(world, layout, tmp_path / str(number))
        kill_at_points(run, [point])
        run.finish()
        assert_same_weights(run, undisturbed[layout])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_at_random_moments(layout: str, world: Path, undisturbed: dict[str, Run], tmp_path: Path) -> None:
    run = Run(world, layout, tmp_path)
    kill_at_times(run, 12, random.Random(layout))
    run.finish()
    assert_same_weights(run, undisturbed[layout])


def test_a_killed_rank_leaves_no_process(world: Path, tmp_path: Path) -> None:
    job = Run(world, "stage 1, expert parallel 2", tmp_path).start()
    wait_for_step(job)
    while not (tmp_path / "run" / TRACKER_FILE).exists():
        time.sleep(0.005)
    helpers = [child for process in job.processes for child in psutil.Process(process.pid).children()]
    job.kill()
    assert not helpers
