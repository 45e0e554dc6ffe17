"""A name means one thing: no two public classes or functions of the package share one, and no two files."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import PurePosixPath

from tests.repo.sources import PACKAGE, FunctionNode, files_ending, repository_files, tree_of

#: What each folder may have: a package's own file, the text that a reader meets first.
IN_EVERY_FOLDER = {"__init__.py", "README.md"}
#: Folders whose files follow one pattern: what a method brings with it is called alike in each method's folder.
ALIKE = f"{PACKAGE}/methods/*/*"
#: Modules that are an old name of another one, kept for a release (mixmoe_megatron.renamed).
OLD_NAMES = {
    f"{PACKAGE}/conversion/megatron_bridge.py": f"{PACKAGE}/integrations/megatron_bridge.py",
    f"{PACKAGE}/training/stock.py": f"{PACKAGE}/integrations/stock_megatron.py",
}


def public_definitions(file: str) -> list[str]:
    """Return the public classes and functions that a file itself defines at its top level."""
    nodes = [node for node in tree_of(file).body if isinstance(node, FunctionNode | ast.ClassDef)]
    return [node.name for node in nodes if not node.name.startswith("_")]


def test_a_public_name_stands_once() -> None:
    places = defaultdict(set)
    for file in files_ending(".py", below=f"{PACKAGE}/"):
        for name in public_definitions(file):
            places[name].add(file)
    twice = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(twice.items()))


def test_a_file_name_stands_once() -> None:
    places = defaultdict(list)
    for file in repository_files():
        path = PurePosixPath(file)
        allowed = path.name in IN_EVERY_FOLDER or path.match(ALIKE) or file in OLD_NAMES
        if path.is_relative_to(PACKAGE) and not allowed:
            places[path.name].append(file)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(twice.items()))


def test_old_names_are_names_of_modules_that_are_there() -> None:
    files = repository_files()
    for old, new in OLD_NAMES.items():
        assert old in files and new in files, f"{old} is no longer an old name of {new}: take it off the list"
        assert not public_definitions(old), f"{old} defines something: it is not just an old name"
