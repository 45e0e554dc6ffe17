"""Jobs of a study: each once, shared, gone on with after a kill, run again where what they depend on has changed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.jobs import OWN, Job, run_jobs, with_parents
from tests.helpers.training import ROOT


def write_job(name: str, text: str, *parents: Job, counter: Path) -> Job:
    """A job that writes its parents' texts and its own, and notes in a file that it ran."""
    inputs = [f"{parent.path('text')}" for parent in parents]
    script = (
        "import sys; from pathlib import Path; text, out, counter, *parents = sys.argv[1:]; "
        "open(counter, 'a').write(text + '\\n'); "
        "Path(out).write_text(''.join(Path(p).read_text() for p in parents) + text)"
    )
    return Job(name, (sys.executable, "-c", script, text, f"{OWN}/text", str(counter), *inputs), parents)


def graph(counter: Path, middle: str = "b") -> tuple[Job, Job, Job, Job]:
    first = write_job("first", "a", counter=counter)
    left, right = (write_job(name, text, first, counter=counter) for name, text in (("left", middle), ("right", "c")))
    return first, left, right, write_job("last", "d", left, right, counter=counter)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_runs_once_and_a_change_reruns_what_depends_on_it(tmp_path: Path, workers: int) -> None:
    root, counter = tmp_path / "jobs", tmp_path / "counter"
    *_, last = graph(counter)
    run_jobs([last], root, workers)
    assert (last.directory(root) / "text").read_text() == "abacd"
    assert sorted(counter.read_text().split()) == ["a", "b", "c", "d"]
    run_jobs([last], root, workers)
    assert len(counter.read_text().split()) == 4
    *_, changed = graph(counter, middle="x")
    run_jobs([changed], root, workers)
    assert sorted(counter.read_text().split()[4:]) == ["d", "x"]
    assert (changed.directory(root) / "text").read_text() == "axacd"


def test_a_key_is_of_command_parents_and_inputs_not_of_the_name(tmp_path: Path) -> None:
    job = Job("a", ("true",))
    assert Job("b", ("true",)).key == job.key
    assert len({job.key, Job("a", ("true",), inputs=("x",)).key, Job("a", ("false",)).key}) == 3
    assert [found.name for found in with_parents(graph(tmp_path))][::3] == ["first", "last"]


def test_a_launcher_starts_every_command_and_changes_no_job(tmp_path: Path) -> None:
    launcher = tmp_path / "srun"
    launcher.write_text('#!/bin/sh\necho "$1 ${OMP_NUM_THREADS:-none}"; shift\nexec "$@"\n')
    launcher.chmod(0o755)
    job = Job("job", ("echo", "here"))
    run_jobs([job], tmp_path / "jobs", launcher=[str(launcher), "--gpus=1"])
    threads = os.environ.get("OMP_NUM_THREADS", "none")  # the node's own cores, not a share of this machine's
    assert (job.directory(tmp_path / "jobs") / "log").read_text().splitlines() == [f"--gpus=1 {threads}", "here"]
    run_jobs([job], tmp_path / "jobs")  # done by whatever started it
    assert "echo here" in (job.directory(tmp_path / "jobs") / "command").read_text()
    with pytest.raises(MixMoEError, match=r"Cannot start nowhere/srun .*, which other needs"):
        run_jobs([Job("other", ("true",))], tmp_path / "jobs", launcher=["nowhere/srun"])


def test_a_failure_is_one_sentence_and_stops_what_runs_beside_it(tmp_path: Path) -> None:
    broken = Job("broken", (sys.executable, "-c", "import time; time.sleep(1); raise SystemExit('error: no space.')"))
    beside = Job("beside", ("sleep", "60"))
    start = time.monotonic()
    with pytest.raises(MixMoEError, match=re.escape("broken failed (no space); its whole output is in ")):
        run_jobs([broken, beside], tmp_path, workers=2)
    assert time.monotonic() - start < 20
    assert not beside.is_done(tmp_path) and not broken.is_done(tmp_path)


def test_after_a_kill_the_orphan_is_waited_for(tmp_path: Path) -> None:
    """kill -9 of the study leaves the job's process alone; the next study waits for its end, then runs the job."""
    script = "import sys, time; print('start', flush=True); time.sleep(3); print('end', flush=True)"
    job = Job("slow", (sys.executable, "-c", script))
    study = (
        f"from pathlib import Path; from mixmoe_megatron.study.jobs import Job, run_jobs; "
        f"run_jobs([Job('slow', {job.words!r})], Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", study], cwd=ROOT)
    log = job.directory(tmp_path) / "log"
    while not (log.is_file() and b"start" in log.read_bytes()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run_jobs([job], tmp_path)
    assert log.read_text().split() == ["start", "end", "start", "end"]
