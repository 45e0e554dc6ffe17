"""A study from its command to its tables, killed on the way, on a model and a text of a few kilobytes."""

from __future__ import annotations

import gzip
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_hf import save_tiny_dense
from tests.helpers.training import ROOT

KILLS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, the first lines of the Estonian text, and the shipped grid with a few steps of a few sentences."""
    folder = tmp_path_factory.mktemp("study")
    save_tiny_dense(folder / "base", "qwen2")
    (folder / "data").mkdir()
    monolingual = [f"mono.{code}.{split}.txt.gz" for code in ("et", "en") for split in ("train", "test")]
    for name in ("et-en.train.tsv.gz", "et-en.test.tsv.gz", *monolingual):
        with gzip.open(ROOT / "examples" / "data" / name, "rt", encoding="utf-8") as stream:
            lines = [line for _, line in zip(range(200), stream, strict=False)]
        with gzip.open(folder / "data" / name, "wt", encoding="utf-8") as stream:
            stream.writelines(lines)
    grid = yaml.safe_load((ROOT / "examples/study/study.yaml").read_text(encoding="utf-8"))
    size = grid["sizes"]["toy"]
    size.update(segments_a_minute=4, sequence=128)
    for kind in ("monolingual", "parallel"):
        size[kind].update(batch=2, steps_a_minute=4)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


def start(world: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    words = f"tools/study.py --grid {world}/grid.yaml --base {world}/base --data {world}/data --pairs et-en --seeds 1 "
    words += f"--minutes 1 --dtype float32 --output-dir {output}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words.split(), *more], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(world: Path, output: Path, *more: str) -> str:
    process = start(world, output, *more)
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_study_gives_the_same_tables_and_shares_its_jobs(world: Path, tmp_path: Path) -> None:
    said = finish(world, tmp_path / "whole")
    assert "22 of 22" in said and "VII: mixmoe better than pt_sft in translation: " in said
    dice = random.Random(3)
    for _ in range(KILLS):
        process = start(world, tmp_path / "killed")
        time.sleep(dice.uniform(5, 30))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    said = finish(world, tmp_path / "killed")
    assert "of 22 jobs were done before" in said
    for name in ("study.csv", "study.md", "table_VII.tex", "table_VII.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    said = finish(world, tmp_path / "whole", "--table", "III")
    assert "evaluate stage1, seed 1: " in said and "train moe on parallel text, seed 1: " in said
    assert not [name for name in ("sft", "pt_sft", "mixmoe") if f"train {name} on " in said]


def test_a_dry_run_writes_nothing(world: Path, tmp_path: Path) -> None:
    said = finish(world, tmp_path / "out", "--dry-run", "--table", "all")
    assert "mixmoe train --mixmoe-stage 2 --init-from" in said
    assert " jobs, 0 of them done; about " in said and "million parameters." in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_table_is_one_sentence(world: Path, tmp_path: Path) -> None:
    process = start(world, tmp_path / "out", "--table", "IX")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "error: There is no table 'IX': choose all, or some of" in said
