"""Every command line in a README is read: the command exists, takes these flags, and has those that it needs.

A line of a ```bash block is parsed by the command's own parser (`make`: by the Makefile; a script of a cluster example:
run with PRINT=1). In running text the flags of a command have to exist.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mixmoe_megatron.__main__ import COMMANDS
from tests.repo.sources import ROOT, files_ending, text_of

#: Commands whose lines nobody reads here, and why.
NOT_READ = {
    "pip": "needs the package index; the wheel and its extras are tests/end_to_end/test_wheel.py's",
    "mapfile": "tests/end_to_end/test_stock_script.py goes this way",
    "torchrun Megatron-LM/pretrain_gpt.py": "an unmodified Megatron-LM, as above",
}
SETTING = re.compile(r"[A-Z_0-9]+=")
TRAIN = "tools/pretrain_mixmoe.py"
BY_FILE = {file: file for file in COMMANDS.values()} | {Path(file).name: file for file in COMMANDS.values()}


def papers() -> list[str]:
    return [name for name in files_ending(".md") if name != "CHANGELOG.md"]


def lines_of(name: str) -> list[str]:
    """Return the command lines of a paper's bash blocks, those of several lines as one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(name) or "", re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def spans_of(name: str) -> Iterator[list[str]]:
    """Yield the words of each piece of code in running text that begins with a command."""
    text = re.sub(r"^```.*?^```", "", text_of(name) or "", flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        words = span.split()
        while words and (SETTING.match(words[0]) or words[0].endswith("python")):
            words.pop(0)
        if words:
            yield words


@cache
def parser_of(file: str) -> argparse.ArgumentParser:
    """Return a command's parser; of the training command, Megatron's with our flags."""
    if file != TRAIN:
        parser: argparse.ArgumentParser = runpy.run_path(str(ROOT / file))["build_parser"]()
        return parser
    from megatron.training.arguments import add_megatron_arguments

    from mixmoe_megatron.training.arguments import add_mixmoe_args

    return add_mixmoe_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of the parsers below it."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= {flag for below in action.choices.values() for flag in flags_of(below)}
    return flags


def check_make(words: list[str]) -> None:
    """Check that targets exist, and that their settings are read by the Makefile or the example of that name."""
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile") or "", re.MULTILINE))
    named = [word for word in words if not SETTING.match(word)]
    assert named and set(named) <= targets, f"no make target: {set(named) - targets}"
    readers = ["Makefile", "tools/setup_environment.sh", *(["tests/gpu/run.py"] if "test-gpu" in named else [])]
    for script in (f"examples/{target}/run.sh" for target in named):
        readers += [script, "examples/resumable.sh"] if (ROOT / script).is_file() else []
    text = "\n".join(text_of(file) or "" for file in readers)
    for name in (word.partition("=")[0] for word in words if SETTING.match(word)):
        read = re.search(rf'\$[{{(]{name}\b|^{name} \?=|"{name}"', text, re.MULTILINE)
        assert read, f"{name} is no setting of make {' '.join(named)}"


def check_script(words: list[str], settings: dict[str, str]) -> None:
    """Check a shell script: that of a cluster example prints its commands, of others the text is parsed."""
    script = ROOT / words[0]
    if "cluster.sh" in script.read_text("utf-8"):
        environment = {**os.environ, **settings, "PRINT": "1"}
        command = ["bash", str(script), *words[1:]]
    else:
        environment, command = dict(os.environ), ["bash", "-n", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_python(words: list[str]) -> None:
    """Check a Python file's or a module's command line."""
    if words[:2] == ["-m", "pytest"]:
        paths = [word.partition("::")[0] for word in words[2:] if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif words[:2] == ["-m", "mixmoe_megatron"]:
        parser_of(COMMANDS[words[2]]).parse_args(words[3:])
    elif words[0] in BY_FILE:
        parser_of(words[0]).parse_args(words[1:])
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, words[0], "--help"]
        told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert all(word in told for word in words[1:] if word.startswith("--"))


def check_line(line: str) -> None:
    """Check one command line, see the top of this file."""
    words = shlex.split(line, comments=True)
    settings = {}
    while words and SETTING.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    command, *words = words or ["nothing"]
    if command == "torchrun":
        while words[0].startswith("--"):
            del words[: 1 if "=" in words[0] else 2]
        command = f"torchrun {words[0]}" if "Megatron-LM" in words[0] else "python"
    if command in NOT_READ or line.startswith("OWN=("):  # an array, for `mapfile`
        return
    if command == "make":
        check_make([*words, *(f"{name}={value}" for name, value in settings.items())])
    elif command == "mixmoe":
        parser_of(COMMANDS[words[0]]).parse_args(words[1:])
    elif command.endswith("python"):
        check_python(words)
    elif command in ("bash", "sbatch"):
        exported = next((word for word in words if word.startswith("--export=ALL,")), "--export=ALL")
        settings |= dict(word.split("=", 1) for word in exported.split(",")[1:])
        check_script([word for word in words if not word.startswith("--")], settings)
    else:
        pytest.fail(f"nobody knows how to read a line of {command}")


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in papers() for line in lines_of(name)])
def test_a_command_line_is_right(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        check_line(line)
    except SystemExit:
        pytest.fail(f"{name}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("name", papers())
def test_commands_in_running_text_exist(name: str) -> None:
    for command, *words in spans_of(name):
        if command == "make" and words:
            check_make([word for word in words if word != "..."])
        elif command == "mixmoe" and words and words[0] not in ("COMMAND", "NAME", "--help"):
            assert words[0] in COMMANDS, f"{name}: mixmoe {words[0]}"
            assert not unknown_flags(COMMANDS[words[0]], words), f"{name}: {words}"
        elif command in BY_FILE:
            assert not unknown_flags(BY_FILE[command], words), f"{name}: {command} {words}"


def unknown_flags(file: str, words: list[str]) -> set[str]:
    """Return the flags among words that a command does not have."""
    named = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
    return named and named - flags_of(parser_of(file))


def test_a_wrong_line_is_found() -> None:
    for line in ("mixmoe to-hf --checkpoints DIR --output-dir OUT", "mixmoe to-hf --output-dir OUT", "mixmoe plan x"):
        with pytest.raises(SystemExit):
            check_line(line)
    for line in ("make quikstart", "make quickstart PAIRS=de-en", "make lint MINUTES=2"):
        with pytest.raises(AssertionError):
            check_line(line)
