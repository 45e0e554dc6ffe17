"""The wheel alone: built, installed in an environment of its own, and the whole path gone with it without the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from mixmoe_megatron.__main__ import COMMANDS
from tests.helpers.command_batch import ROOT
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense
from tests.helpers.training import TINY_RUN
from tests.repo.sources import repository_files

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "mixmoe_megatron", "tools", "checkpoints_conversion")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, so that nothing is left in the clone."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "-w", out, copy], check=True, stdout=subprocess.DEVNULL)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel, which sees this one's other packages behind it."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment / "bin" / "python"]
    # pip takes what it finds beside itself, this clone, for installed there
    install = [*pip, "install", "--ignore-installed", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL, cwd=environment)
    (site,) = environment.glob("lib/python*/site-packages")
    behind = [path for path in sys.path if path.endswith("site-packages")]
    (site / "behind.pth").write_text("\n".join(behind) + "\n", "utf-8")  # not their .pth files: they know the clone
    return environment / "bin"


def test_the_wheel_holds_the_package_and_the_commands(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {name for name in repository_files() if name.startswith("mixmoe_megatron/") and not name.endswith(".md")}
    assert found == package | {f"mixmoe_megatron/{file}" for file in COMMANDS.values()}


@pytest.mark.timeout(600)
def test_the_whole_path_without_the_clone(programs: Path, tmp_path: Path) -> None:
    """Convert, tokenise, train both stages (the first under torchrun), export, compare, evaluate."""
    save_tiny_dense(tmp_path / "base", "qwen2")
    lines = [text.replace("\n", " ") for text in SENTENCES]
    (tmp_path / "text.txt").write_text("\n".join(f"{line} {n}" for n in range(20) for line in lines) + "\n", "utf-8")
    rows = [f"{line}\tHouse {n}" for n, line in enumerate(lines)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["de\ten", *rows]) + "\n", "utf-8")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(program: str, words: str) -> str:
        command = [programs / program, *words.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    place = run("python", "-c print(__import__('mixmoe_megatron').__file__)")
    assert Path(place).is_relative_to(programs.parent)
    data = "--tokenizer up/tokenizer --output-prefix"
    steps = f"{TINY_RUN} --train-iters 2 --data-cache-path cache --save-interval 2"
    run("mixmoe", "hf-to-megatron --hf-dir base --output-dir up --moe-every 2")
    run("mixmoe", f"preprocess mono --input text.txt {data} mono --min-tokens 1")
    run("mixmoe", f"preprocess parallel --input pairs.tsv --source-language de --target-language en {data} pairs")
    stage1 = f"train --mixmoe-stage 1 --init-from up --data-path mono --save stage1 {steps}"
    assert "iteration        2/" in run("python", f"-m torch.distributed.run --standalone -m mixmoe_megatron {stage1}")
    stage2 = f"train --mixmoe-stage 2 --init-from stage1 --data-path pairs --save stage2 {steps} --seq-length 160"
    assert "iteration        2/" in run("mixmoe", stage2)
    run("mixmoe", "to-hf --checkpoint-dir stage2 --output-dir hf")
    assert "the models agree" in run("mixmoe", "parity --hf-dir hf --checkpoint-dir stage2")
    systems = "--system base=base --system mixmoe=hf --baseline base --test de-en=pairs.tsv --mono de=text.txt"
    few = "--limit 2 --mono-limit 2 --decoding greedy --max-new-tokens 2"
    assert "mixmoe" in run("mixmoe", f"evaluate {systems} {few} --output-dir evaluation")
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
