"""Who may import whom (the layers of the package), and that importing needs no GPU library and does nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from fnmatch import fnmatch

import pytest

from tests.repo.sources import PACKAGE, ROOT, files_ending, imported_names, is_within, module_name

# The modules whose import needs a package that is not installed, and the files that may import them: their own, and
# what `make test-bridge` and `make test-fairseq2` test or run.
OPTIONAL_MODULES = {
    f"{PACKAGE}.integrations.megatron_bridge": ("tests/bridge/",),
    f"{PACKAGE}.integrations.fairseq2": (
        f"{PACKAGE}/integrations/fairseq2/", "tests/fairseq2/", "tests/helpers/fairseq2_models.py",
        "tests/unit/test_fairseq2_cards.py", "tools/fairseq2_",
    ),
}  # fmt: skip
NOT_THE_PACKAGE = ["tools", "examples", "checkpoints_conversion", "tests"]
# What a model computes with; its sizes, options and operations are plain Python that every room may read.
_COMPUTING = ("attention", "backends", "expert_ops", "experts", "freezing", "frozen_prefix", "layer_specs", "recompute")
MODEL_CODE = [f"{PACKAGE}.model.{name}" for name in (*_COMPUTING, "moe_layer", "router")]
MODEL_CODE += [f"{PACKAGE}.hf"]

# files -> what they may not import, with exceptions
FORBIDDEN: list[tuple[str, list[str], list[str]]] = [
    ("mixmoe_megatron/**", NOT_THE_PACKAGE, []),
    ("mixmoe_megatron/model/**", ["megatron.training", "transformers"], []),
    ("mixmoe_megatron/checkpoint/**", ["megatron", "transformers", f"{PACKAGE}.conversion"], []),
    ("mixmoe_megatron/data/**", ["megatron", *MODEL_CODE], ["megatron.core.datasets"]),
    (
        "mixmoe_megatron/evaluation/**",
        ["megatron", *MODEL_CODE, f"{PACKAGE}.study"],
        ["megatron.core.datasets", f"{PACKAGE}.hf"],
    ),
    ("mixmoe_megatron/study/**", ["megatron", *MODEL_CODE], []),
]

# files -> the only modules outside the standard library that they may import
ALLOWED: list[tuple[str, list[str]]] = [
    ("mixmoe_megatron/hf/**", ["torch", "transformers", f"{PACKAGE}.hf"]),
    ("mixmoe_megatron/methods/**", [f"{PACKAGE}.errors", f"{PACKAGE}.methods"]),
    ("mixmoe_megatron/model/upcycling.py", ["numpy", f"{PACKAGE}.errors"]),
    ("mixmoe_megatron/model/mapping.py", ["numpy", f"{PACKAGE}.methods", f"{PACKAGE}.model"]),
]
# The rooms that may import megatron.training; the benchmarks of planning/ run what training/ runs.
ON_MEGATRON_TRAINING = ("training/", "megatron_patches/", "integrations/", "planning/")


def package_files(pattern: str) -> list[str]:
    return [name for name in files_ending(".py", below=f"{PACKAGE}/") if fnmatch(name, pattern)]


@pytest.mark.parametrize(("pattern", "forbidden", "exceptions"), FORBIDDEN, ids=[row[0] for row in FORBIDDEN])
def test_forbidden_imports(pattern: str, forbidden: list[str], exceptions: list[str]) -> None:
    found = []
    for file in package_files(pattern):
        for name, line in imported_names(file):
            # "from megatron.core import datasets" names megatron.core too: a parent of an exception is let pass
            excepted = any(is_within(name, ok) or is_within(ok, name) for ok in exceptions)
            if not excepted and any(is_within(name, bad) for bad in forbidden):
                found.append(f"{file}:{line} imports {name}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("pattern", "allowed"), ALLOWED, ids=[row[0] for row in ALLOWED])
def test_self_contained_modules(pattern: str, allowed: list[str]) -> None:
    found = []
    for file in package_files(pattern):
        for name, line in imported_names(file):
            standard = name.split(".")[0] in sys.stdlib_module_names
            if not standard and name != PACKAGE and not any(is_within(name, ok) for ok in allowed):
                found.append(f"{file}:{line} imports {name}; allowed: {', '.join(allowed)}")
    assert not found, "\n".join(found)


def is_optional(name: str) -> bool:
    return any(is_within(name, module) for module in OPTIONAL_MODULES)


@pytest.mark.parametrize("module", OPTIONAL_MODULES)
def test_nothing_else_imports_an_optional_module(module: str) -> None:
    files = [name for name in files_ending(".py") if not name.startswith(OPTIONAL_MODULES[module])]
    assert not [file for file in files for name, _ in imported_names(file) if is_within(name, module)]


def test_few_rooms_import_megatron_training() -> None:
    """CPU mode replaces Megatron functions on a machine without CUDA, and imports them only when it is asked to."""
    cpu_mode = f"{PACKAGE}/megatron_patches/cpu_mode.py"
    at_module_level = [name for name, _ in imported_names(cpu_mode, module_level_only=True)]
    assert not any(is_within(name, "megatron.training") for name in at_module_level)
    found = [
        f"{file}:{line} imports {name}"
        for file in package_files("*")
        if not file.startswith(tuple(f"{PACKAGE}/{room}" for room in ON_MEGATRON_TRAINING))
        for name, line in imported_names(file)
        if is_within(name, "megatron.training") or is_within(name, f"{PACKAGE}.training")
    ]
    assert not found, "\n".join(found)


# Runs in a process of its own. Third-party modules come first, so that what they do at import is not put down to ours.
IMPORT_EVERYTHING = """
import importlib, importlib.machinery, importlib.util, json, logging, os, signal, sys, warnings

root, package, hf_modules, third_party, modules, scripts = json.loads(sys.argv[1])
sys.path.insert(0, root)

def find_spec(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    # GPU libraries look uninstalled, both to import and to importlib.util.find_spec
    return None if name.split(".")[0] in ("transformer_engine", "apex", "flash_attn") else find(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
problems, raised = [], []

def attempt(label, action):
    try:
        action()
    except BaseException as error:
        problems.append(f"{label}: {type(error).__name__}: {error}")

def run_script(path):
    spec = importlib.util.spec_from_file_location("script_" + os.path.basename(path)[:-3], path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

def state():
    import numpy, torch
    return {
        "environment": dict(os.environ),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "torch threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "torch seed": torch.initial_seed(),
        "numpy state": numpy.random.get_state()[1].tobytes(),
        "CUDA": (torch.cuda.is_initialized(), torch.cuda.is_available),
        "process group": torch.distributed.is_initialized(),
    }

warnings.simplefilter("ignore")
for name in hf_modules:
    attempt(name, lambda: importlib.import_module(name))
loaded = [name for name in ("megatron", "transformer_engine") if name in sys.modules]
if loaded:
    problems.append(f"importing {package}.hf loads {loaded}")
for name in third_party:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # optional, or a name and not a module: our own import shows it
before = state()
warnings.simplefilter("always")
warnings.showwarning = lambda message, category, filename, line, *rest: raised.append((filename, line, str(message)))
for name in modules:
    attempt(name, lambda: importlib.import_module(name))
for path in scripts:
    attempt(path, lambda: run_script(path))
after = state()
problems += [f"importing changes: {what}" for what in before if before[what] != after[what]]
problems += [f"warning at {file}:{line}: {text}" for file, line, text in raised
             if file.startswith(root) and "site-packages" not in file]
print("RESULT" + json.dumps(problems))
"""


def test_every_module_imports_without_gpu_libraries_warnings_or_side_effects() -> None:
    modules = [module_name(name) for name in files_ending(".py", below=f"{PACKAGE}/")]
    modules = [name for name in modules if not is_optional(name)]
    scripts = [name for folder in ("tools/", "checkpoints_conversion/") for name in files_ending(".py", below=folder)]
    third_party = {
        name
        for file in files_ending(".py", below=f"{PACKAGE}/") + scripts
        for name, _ in imported_names(file, module_level_only=True)
        if name.split(".")[0] not in {*sys.stdlib_module_names, PACKAGE, *NOT_THE_PACKAGE}
    }
    hf_modules = [name for name in modules if is_within(name, f"{PACKAGE}.hf")]
    work = [str(ROOT), PACKAGE, hf_modules, sorted(third_party), modules, [str(ROOT / name) for name in scripts]]
    command = [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(work)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    printed, _, answer = result.stdout.partition("RESULT")
    problems = json.loads(answer)
    assert not problems, "\n".join(problems)
    assert not printed.strip(), f"importing prints: {printed}"


@pytest.mark.parametrize(("old", "name"), [("training.stock", "stage1"), ("conversion.megatron_bridge", "__doc__")])
def test_old_import_paths_answer_with_a_warning(old: str, name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{old}")
    if name.startswith("__"):  # Megatron-Bridge is not installed here
        assert PACKAGE in getattr(module, name)
    else:
        with pytest.warns(FutureWarning, match="is now mixmoe_megatron.integrations.stock_megatron"):
            assert callable(getattr(module, name))
    assert not hasattr(module, "__path__")
