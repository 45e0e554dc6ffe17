"""Run the repository's commands as jobs of several processes, forked from one that has imported everything already.

An import of torch and Megatron costs a processor ten seconds, a tiny training run two. Each process is what torchrun
would start: the real script with its command line, RANK, WORLD_SIZE and so on in its environment. Like torchrun, a job
ends as soon as one of its processes fails.

With DEVICE=cuda each process starts afresh: CUDA does not outlive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A job that has been started.

    Args:
        words: the script, relative to the repository, and its arguments.
        processes: how many.
        logs: an empty or missing directory for stdout and stderr of each rank.
        environment: variables beside torchrun's.
        prelude: called in each process before its script, such as one of `tests.helpers.crashes`.
    """

    def __init__(
        self,
        words: list[str],
        processes: int,
        logs: Path,
        environment: dict[str, str] | None = None,
        prelude: Callable[[], None] | None = None,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        # The tests' own process serves the store, like torchrun's agent: no port that another job may take in between.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {**(environment or {}), "MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port)}
        common |= {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        self.processes: list[Any] = [
            _context().Process(
                target=_run_script,
                args=(words, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, logs / str(rank), prelude),
            )
            for rank in range(processes)
        ]
        for rank, process in enumerate(self.processes):
            (logs / f"{rank}.out").touch()
            process.start()

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Wait for the end and return the exit codes (minus the signal's number for a killed process).

        Raises:
            TimeoutError: the job took longer than `timeout` seconds; it has been killed.
        """
        end = time.monotonic() + timeout
        while running := [process for process in self.processes if process.is_alive()]:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no end after {timeout} s:\n{self.output()[-8000:]}")
            wait([process.sentinel for process in running], timeout=1.0)
            if any(process.exitcode for process in self.processes):
                time.sleep(0.3)  # the others may be about to say why
                self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to one rank, or to all that still run."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                process.kill()
        if rank is None:
            for process in self.processes:
                process.join()

    def stdout(self, rank: int) -> str:
        """What a rank has written to stdout so far."""
        return (self.logs / f"{rank}.out").read_text("utf-8")

    def output(self) -> str:
        """What all ranks have written so far, errors last: a message keeps the end of it."""
        return "\n".join(f"--- {path.name}\n{path.read_text('utf-8')}" for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(self.logs.iterdir(), key=lambda path: (path.suffix != ".out", path.name))


def run_job(
    words: list[str],
    processes: int,
    logs: Path,
    environment: dict[str, str] | None = None,
    prelude: Callable[[], None] | None = None,
) -> Job:
    """Run a job to its end; the arguments are `Job`'s.

    Raises:
        AssertionError: a process failed; the message holds the output of all.
    """
    job = Job(words, processes, logs, environment, prelude)
    codes = job.wait()
    assert not any(codes), f"exit codes {codes}\n{job.output()[-12000:]}"
    return job


@cache
def _context() -> BaseContext:
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if os.environ.get("DEVICE") == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    return context


def _run_script(words: list[str], environment: dict[str, str], log: Path, prelude: Callable[[], None] | None) -> None:
    """The process itself: what `python script arguments` does, its output in files."""
    os.environ.update(environment)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were started in the background
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = list(words)
    if prelude is not None:
        prelude()
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
