"""What every command shares: its output on any terminal, into any pipe, and the system's refusals in one sentence."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmoe_megatron.cli import run_command, write_json

PRINTING = """
import sys
from mixmoe_megatron.cli import run_command, setup_logging
setup_logging()
def command():
    for number in range({lines}):
        print("n \\u03a3 f P \\u4e16\\u754c \\udcfc")
sys.exit(run_command(command))
"""


def run(script: str, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a Python script by the shell, which reports Python's own exit status."""
    line = f'set -o pipefail; "$PYTHON" -c "$SCRIPT" {redirection}'
    environment = {**os.environ, "PYTHON": sys.executable, "SCRIPT": script, **variables}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, b"n \\u03a3 f P \\u4e16\\u754c \\udcfc\n"),
        ({"PYTHONIOENCODING": "ascii"}, b"n \\u03a3 f P \\u4e16\\u754c \\udcfc\n"),
        ({"PYTHONIOENCODING": "iso-8859-7"}, b"n \xd3 f P \\u4e16\\u754c \\udcfc\n"),
        ({"LC_ALL": "C", "PYTHONIOENCODING": ""}, "n Σ f P 世界 \\udcfc\n".encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}, b"n \\u03a3 f P \\u4e16\\u754c \\udcfc\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "n Σ f P 世界 \\udcfc\n".encode()),
    ],
)
def test_tables_print_on_any_terminal(variables: dict[str, str], shown: bytes) -> None:
    done = run(PRINTING.format(lines=1), **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_wants_no_more(lines: int, unbuffered: str) -> None:
    done = run(PRINTING.format(lines=lines), "| true", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_to_a_full_disk(lines: int, unbuffered: str) -> None:
    done = run(PRINTING.format(lines=lines), "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    message = b"error: [Errno 28] No space left on device: make room and start the same command again.\n"
    assert done.stderr == message


CODE_CACHE = """
import os, sys
from mixmoe_megatron.cli import run_command
sys.exit(run_command(lambda: print(os.environ.get("HF_MODULES_CACHE"))))
"""


def test_models_code_has_a_place_without_a_writable_home(tmp_path: Path) -> None:
    """What a file stands in the way of cannot be written, by root neither."""
    (tmp_path / "file").touch()
    (tmp_path / "scratch").mkdir()
    places = {"HF_HOME": "", "XDG_CACHE_HOME": "", "HF_MODULES_CACHE": ""}
    done = run(CODE_CACHE, **places, HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "scratch"))
    assert done.stdout.startswith(os.fsencode(tmp_path / "scratch" / "mixmoe_modules_")) and done.stderr == b""
    assert list((tmp_path / "scratch").iterdir()) == [], "it goes with the process"
    (tmp_path / "home").mkdir()
    done = run(CODE_CACHE, **places, HOME=str(tmp_path / "home"))
    assert done.stdout == b"\n"
    assert (tmp_path / "home" / ".cache" / "huggingface" / "modules").is_dir()


def test_closed_output() -> None:
    done = run(PRINTING.format(lines=1), ">&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO])
def test_what_the_system_refuses_is_one_sentence(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    assert run_command(command) == 2
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}: 'some/file'\n"


def test_a_broken_pipe_that_is_not_the_output_is_a_defect() -> None:
    def command() -> None:
        raise BrokenPipeError(errno.EPIPE, "another pipe")

    with pytest.raises(BrokenPipeError):
        run_command(command)


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"Gr\xfc\xdfe.txt")
    write_json(tmp_path / "manifest.json", {"sources": [name]})
    assert json.loads((tmp_path / "manifest.json").read_text("utf-8")) == {"sources": [name]}
