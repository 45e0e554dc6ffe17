"""Without the extras the package imports and every command starts; what needs one names it in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from mixmoe_megatron.__main__ import COMMANDS
from mixmoe_megatron.cli import EXTRAS
from tests.repo.sources import PACKAGE, ROOT, files_ending, imported_names, module_name
from tests.repo.test_imports import is_optional

#: the modules that score and draw: they import their extra's packages first, so that nobody waits for hours before
WITH_EXTRAS = {
    *(f"{PACKAGE}.evaluation.{name}" for name in ("comet_scores", "meteor", "scores")),
    *(
        f"{PACKAGE}.study.{name}"
        for name in ("figures", "html_report", "report", "runner", "study_page", "study_results", "transfer", "trials")
    ),
}
#: command lines that need an extra, and the package that is found missing; none of the files exists
NEEDING = {
    "evaluate": ("--system a=b --output-dir c", "sacrebleu"),
    "report": ("--evaluation a --output-dir b", "matplotlib"),
    "routing": ("--model a --mono de=b --output-dir c", "matplotlib"),
    "study": ("--output-dir a", "matplotlib"),
    "transfer-matrix": ("--evaluation a --output-dir b", "matplotlib"),
}
# Runs in a process of its own. The packages look uninstalled, to import and to importlib.util.find_spec.
WITHOUT_EXTRAS = """
import contextlib, importlib, importlib.machinery, io, json, runpy, sys, warnings

hidden, modules, commands, needing = json.loads(sys.argv[1])

def find_spec(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    return None if name.split(".")[0] in hidden else find(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
warnings.simplefilter("ignore")

def run(file, words):
    sys.argv = [file, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = runpy.run_path(file)["main"]()
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status = repr(error)
    return [status or 0, out.getvalue(), err.getvalue()]

missing = {}
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name.split(".")[0]
result = {"missing": missing, "needing": {name: run(commands[name], words.split()) for name, words in needing.items()}}
result["help"] = {name: run(file, ["--help"]) for name, file in commands.items()}
sys.stdout.write("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def without_extras() -> dict[str, Any]:
    """What a process says that has none of the extras' packages."""
    modules = [module_name(name) for name in files_ending(".py", below=f"{PACKAGE}/")]
    modules = [name for name in modules if not is_optional(name)]
    needing = {name: words for name, (words, _) in NEEDING.items()}
    work = json.dumps([sorted(EXTRAS), [name for name in modules if "__main__" not in name], COMMANDS, needing])
    command = [sys.executable, "-c", WITHOUT_EXTRAS, work]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.partition("RESULT")[2])
    return result


def test_only_what_scores_and_draws_needs_an_extra(without_extras: dict[str, Any]) -> None:
    assert set(without_extras["missing"]) == WITH_EXTRAS
    assert set(without_extras["missing"].values()) <= set(EXTRAS)


def test_every_command_lists_its_options(without_extras: dict[str, Any]) -> None:
    failed = {name: (status, err) for name, (status, _, err) in without_extras["help"].items() if status}
    assert not failed
    assert all("usage: " in out for _, out, _ in without_extras["help"].values())


@pytest.mark.parametrize("name", NEEDING)
def test_a_command_names_the_extra(without_extras: dict[str, Any], name: str) -> None:
    package = NEEDING[name][1]
    told = f"error: {package} is not installed: pip install 'mixmoe-megatron[{EXTRAS[package]}]' adds it.\n"
    assert without_extras["needing"][name] == [2, "", told]


def test_every_import_is_required_or_an_extra() -> None:
    """The names by which packages are imported, beside those by which they are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed_as = {"lingua": "lingua-language-detector", "comet": "unbabel-comet"}
    for package, extra in EXTRAS.items():
        wanted = installed_as.get(package, package)
        assert any(line.startswith(wanted) for line in project["optional-dependencies"][extra]), wanted
    required = {"torch", "megatron", "transformers", "safetensors", "sentencepiece", "numpy", "xxhash"}
    required |= {"tensorboard", "tqdm", "yaml"}
    with_transformers = {"huggingface_hub", "tokenizers"}
    inside = {PACKAGE, "configuration_mixmoe", "modeling_mixmoe", "transformer_engine", *sys.stdlib_module_names}
    sources = [*files_ending(".py", below=f"{PACKAGE}/"), *COMMANDS.values()]
    imported = {name.partition(".")[0] for file in sources if not is_optional(module_name(file))
                for name, _ in imported_names(file)}  # fmt: skip
    assert imported - inside - {""} == required | with_transformers | set(EXTRAS)
