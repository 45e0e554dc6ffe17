"""Every change to another package's modules and classes is made in megatron_patches/, and `install.py` states it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.repo.sources import PACKAGE, files_ending, imported_names, text_of, tree_of

ROOM = f"{PACKAGE}/megatron_patches/"
#: A name that is added to another package's module, which changes nothing there: file and target, with the reason.
ADDED = {
    f"{PACKAGE}/integrations/fairseq2/extension.py": "transformers.ExportedMixMoEConfig",  # where fairseq2 looks for it
}


def assigned_attributes(tree: ast.Module) -> Iterator[ast.Attribute]:
    """Yield the targets of the form `a.b = ...`, `setattr(a, ...)` as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield ast.Attribute(node.args[0], ast.unparse(node.args[1]), lineno=node.lineno)


def imported(tree: ast.Module) -> set[str]:
    """Return the names that a file knows by an import alone, not as a variable or an argument too."""
    nodes = list(ast.walk(tree))
    names = {alias.asname or alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    names -= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names - {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_only_the_room_of_patches_changes_what_others_wrote() -> None:
    found = []
    for file in files_ending(".py", below=f"{PACKAGE}/"):
        if file.startswith(ROOM):
            continue
        names = imported(tree_of(file))
        for target in assigned_attributes(tree_of(file)):
            if ADDED.get(file) == ast.unparse(target):
                continue
            if ast.unparse(target) == "sys.argv":  # what a command reads, handed to the command that `mixmoe` names
                continue
            owner = target.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if ast.unparse(owner) in names or "import_module" in ast.unparse(owner) or target.attr == "__class__":
                found.append(f"{file}:{target.lineno}: {ast.unparse(target)}")
    assert not found, "\n".join(found)


def test_install_states_every_patch() -> None:
    """Each file of the room but the means of wrapping is called by `install.py`, and says what it changes where."""
    stated = {name for name, _ in imported_names(f"{ROOM}install.py")}
    for file in files_ending(".py", below=ROOM):
        name = file.removeprefix(ROOM).removesuffix(".py")
        if name in ("__init__", "install", "wrapping"):
            continue
        assert f"{PACKAGE}.megatron_patches.{name}" in stated, f"install.py does not state {name}"
        head = ast.get_docstring(tree_of(file)) or ""
        assert "Source: `" in head and "0.19.2" in head, f"{file}: what of which Megatron does it change?"
    assert "0.19.2" in (text_of(f"{ROOM}install.py") or "")
