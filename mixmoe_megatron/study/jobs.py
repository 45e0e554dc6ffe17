"""Commands that depend on each other: each runs once, a killed one goes on, a changed one runs again with its children.

A job is a command that a user could type. Its key is a hash of the command, of the files that it reads and, since the
command names the parents' directories, of the parents' keys. All jobs with one key are one job, whoever asks for it.

Layout: ``jobs/KEY/command`` (the command line), ``log``, ``lock``, ``done.json`` (seconds and commit; the last thing
written), and what the command writes. A job's process holds ``lock``, and so does one that outlived a killed study: who
wants the job next waits for it, then runs the command again, which goes on from what is there. Every command has to
allow that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.provenance import git_commit

logger = logging.getLogger(__name__)

JOBS, OWN = "{jobs}", "{out}"  # in a job's words: the directory of all jobs, and the job's own
MIXMOE = "mixmoe"  # as the first word: a command of this package, by the Python that runs the study
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A command and what it needs.

    Attributes:
        name: For people; not part of the key.
        words: The command line; `JOBS` and `OWN` in it stand for directories.
        parents: Jobs whose directories the words name, see `path`.
        inputs: Fingerprint of each file or directory that it reads and that no job makes.
        cost: Expected seconds.
        disk: Expected bytes.
    """

    name: str
    words: tuple[str, ...]
    parents: tuple[Job, ...] = ()
    inputs: tuple[str, ...] = ()
    cost: float = 1.0
    disk: float = 0.0

    @cached_property
    def key(self) -> str:
        """The hash that says what the job is, 16 hexadecimal digits."""
        text = json.dumps([self.words, [parent.key for parent in self.parents], self.inputs])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

    def path(self, name: str = "") -> str:
        """Return a file or directory that the job makes, as another job's words say it."""
        return "/".join(filter(None, [JOBS, self.key, name]))

    def directory(self, root: Path) -> Path:
        """Return the job's directory below the directory of all jobs."""
        return root / self.key

    def command(self, root: Path) -> list[str]:
        """Return the command line with the directories in their places."""
        own = str(self.directory(root))
        words = [word.replace(OWN, own).replace(JOBS, str(root)) for word in self.words]
        return [sys.executable, "-m", "mixmoe_megatron", *words[1:]] if words[0] == MIXMOE else words

    def typed(self, root: Path) -> str:
        """Return the command line as a user would type it."""
        words = self.command(root)
        return shlex.join([MIXMOE, *words[3:]] if self.words[0] == MIXMOE else words)

    def is_done(self, root: Path) -> bool:
        """Tell whether the job has run to its end."""
        return (self.directory(root) / "done.json").is_file()


class Launch(NamedTuple):
    """How the process of a job starts.

    Attributes:
        words: Before its command line, such as ``srun --gpus 1``; they must wait for its end, and end it when they end.
        environment: Of the process.
    """

    words: tuple[str, ...]
    environment: dict[str, str]


def with_parents(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs and all that they depend on, each key once, parents first."""
    known: dict[str, Job] = {}
    waiting = list(jobs)
    while waiting:
        job = waiting.pop()
        if job.key not in known:
            known[job.key] = job
            waiting.extend(job.parents)
    graph = {key: [parent.key for parent in known[key].parents] for key in sorted(known)}
    return [known[key] for key in TopologicalSorter(graph).static_order()]


def run_job(job: Job, root: Path, launch: Launch, stopping: threading.Event) -> float:
    """Run a job unless it is done.

    Args:
        job: Its parents are done.
        root: Directory of all jobs.
        launch: How its process starts.
        stopping: Set by who wants the job to be stopped.

    Returns:
        Seconds that it took; 0 where it was done.

    Raises:
        MixMoEError: The command failed or was stopped, or there is no such launcher.
    """
    directory = job.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    command = [*launch.words, *job.command(root)]
    with (directory / "lock").open("a") as lock, (directory / "log").open("ab") as log:
        _take(lock.fileno(), job, stopping)
        if job.is_done(root):
            return 0.0
        write_text(directory / "command", job.typed(root) + "\n")
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=launch.environment,
                pass_fds=(lock.fileno(),),
            )  # fmt: skip
        except OSError as error:
            raise MixMoEError(f"Cannot start {command[0]} ({error.strerror}), which {job.name} needs.") from error
        while process.poll() is None:
            if stopping.wait(_POLL_SECONDS):
                process.terminate()
                process.wait()
        if process.returncode:
            raise MixMoEError(f"{job.name} failed{_reason(directory / 'log')}; its whole output is in {directory}/log.")
        seconds = time.monotonic() - start
        done = {"name": job.name, "seconds": round(seconds, 1), "command": job.words, "commit": git_commit()}
        write_json(directory / "done.json", done)
        return seconds


def _take(lock: int, job: Job, stopping: threading.Event) -> None:
    """Wait until nobody else runs the job."""
    told = False
    while not stopping.is_set():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                logger.info("%s: waiting for the process that runs it, of another study or of a killed one", job.name)
            told = True
            stopping.wait(_POLL_SECONDS)
    raise MixMoEError(f"{job.name} was not started: the study is stopping.")


def _reason(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return f" ({errors[-1].removeprefix('error: ').rstrip('.')})" if errors else ""


class _Progress:
    """Tells after each job how far the study is and how long the rest may take."""

    def __init__(self, waiting: Sequence[Job], workers: int) -> None:
        self._waiting = {job.key: job.cost for job in waiting}
        self._number, self._total, self._workers = 0, len(waiting), workers
        self._seconds = self._expected = 0.0

    def tell(self, job: Job, seconds: float) -> None:
        self._number += 1
        self._seconds += seconds
        self._expected += self._waiting.pop(job.key)
        left = sum(self._waiting.values()) * self._seconds / self._expected / self._workers
        rest = f"; about {max(1, round(left / 60))} min left" if self._waiting else ""
        logger.info("[%d of %d] %s: %.0f s%s", self._number, self._total, job.name, seconds, rest)


def run_jobs(
    jobs: Sequence[Job],
    root: Path,
    workers: int = 1,
    started: Callable[[Job], None] | None = None,
    launcher: Sequence[str] = (),
) -> None:
    """Run jobs and what they depend on, several at a time; the same call goes on after a kill.

    Args:
        jobs: What is wanted.
        root: Directory of all jobs, created if absent.
        workers: Jobs at a time; they share the processor's cores unless OMP_NUM_THREADS or a launcher says otherwise.
        started: Called with each job that is about to run.
        launcher: Words before the command line of each job, see `Launch`.

    Raises:
        MixMoEError: A command failed, or there is no such launcher; what runs beside it is stopped.
    """
    ordered = with_parents(jobs)
    waiting = [job for job in ordered if not job.is_done(root)]
    if len(waiting) < len(ordered):
        logger.info("%d of %d jobs were done before", len(ordered) - len(waiting), len(ordered))
    by_key, progress = {job.key: job for job in waiting}, _Progress(waiting, workers)
    sorter = TopologicalSorter({job.key: [p.key for p in job.parents if p.key in by_key] for job in waiting})
    sorter.prepare()
    shared = {} if launcher else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    environment = {**shared, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    launch = Launch(tuple(launcher), environment)
    stopping, running = threading.Event(), dict[Future[float], str]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while sorter.is_active():
                for key in sorter.get_ready():
                    running[pool.submit(_start, by_key[key], root, launch, stopping, started)] = key
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    progress.tell(by_key[key], future.result())
                    sorter.done(key)
        finally:  # nothing runs where all went well
            stopping.set()


def _start(
    job: Job, root: Path, launch: Launch, stopping: threading.Event, started: Callable[[Job], None] | None
) -> float:
    if started and not stopping.is_set():
        started(job)
    return run_job(job, root, launch, stopping)
