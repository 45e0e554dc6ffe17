"""`mixmoe` knows every command, in a clone and in a wheel, and lists them fast."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib

from mixmoe_megatron.__main__ import COMMANDS
from tests.repo.sources import COMMAND_FOLDERS, PACKAGE, ROOT, files_ending, module_name

LISTING = f"""
import sys
from {PACKAGE}.__main__ import mixmoe
status = mixmoe()
print(sorted({{"numpy", "torch", "transformers", "megatron"}} & set(sys.modules)))
sys.exit(status)
"""


def test_every_command_has_a_name() -> None:
    files = [name for folder in COMMAND_FOLDERS for name in files_ending(".py", below=f"{folder}/")]
    assert sorted(COMMANDS.values()) == sorted(files)


def test_a_wheel_holds_every_room_and_the_commands() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {module_name(name) for name in files_ending("/__init__.py", below=f"{PACKAGE}/")}
    folders = {f"{PACKAGE}.{folder}": folder for folder in COMMAND_FOLDERS}
    assert setup["package-dir"] == folders
    assert sorted(setup["packages"]) == sorted(rooms | set(folders))


def test_the_list_is_there_at_once() -> None:
    """By the processor's time, which other work on the machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", LISTING, "--help"], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(COMMANDS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_a_command_that_does_not_exist() -> None:
    done = subprocess.run([sys.executable, "-m", PACKAGE, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: there is no command trian; `mixmoe --help` lists them.\n")


def test_a_command_by_its_name_is_the_file() -> None:
    named = subprocess.run([sys.executable, "-m", PACKAGE, "plan", "--help"], cwd=ROOT, capture_output=True, text=True)
    file = subprocess.run(
        [sys.executable, COMMANDS["plan"], "--help"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    options = [text.stdout.partition("\n\n")[2] for text in (named, file)]
    assert named.stdout.startswith("usage: mixmoe plan [-h]") and options[0] == options[1] != ""
