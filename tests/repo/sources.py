"""What the repository's own tests look at: its files, its Python sources and their imports."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mixmoe_megatron"
COMMAND_FOLDERS = ("tools", "checkpoints_conversion")
RULES = "tests/repo/"  # the rules' own files name what they ban

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def repository_files() -> tuple[str, ...]:
    """Return the files that git tracks or would track, as sorted paths with slashes relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(sorted(name for name in listing.split("\0") if name and (ROOT / name).is_file()))


def files_ending(*suffixes: str, below: str = "") -> list[str]:
    """Return the repository's files with one of the suffixes, below a folder (given with its slash)."""
    return [name for name in repository_files() if name.endswith(suffixes) and name.startswith(below)]


@functools.cache
def text_of(name: str) -> str | None:
    """Return a file's text, or None when it is not UTF-8 text."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


@functools.cache
def tree_of(name: str) -> ast.Module:
    """Return a Python file's syntax tree."""
    return ast.parse(text_of(name) or "", filename=name)


def module_name(name: str) -> str:
    """Return the dotted module name of a Python file."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(name: str, module_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (dotted absolute name, line) of every import in a file, those inside functions included.

    ``from a.b import c`` gives a.b and a.b.c, since c may be a module. import_module("a.b") counts as an import.
    """
    nodes = tree_of(name).body if module_level_only else ast.walk(tree_of(name))
    package = module_name(name).split(".")
    if not name.endswith("/__init__.py"):
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((str(name.value), node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


def is_within(name: str, prefix: str) -> bool:
    """Return whether a dotted name is the prefix or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


def functions_of(name: str) -> Iterator[FunctionNode]:
    """Yield every function and method of a Python file, nested ones included."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, FunctionNode):
            yield node
