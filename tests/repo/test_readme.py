"""README's annotated tree matches the repository, its relative links lead somewhere, its make targets exist."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from tests.repo.sources import ROOT, repository_files, text_of

TREE = re.compile(r"<!-- tree -->\s*```text\n(.*?)```", re.DOTALL)
ENTRY = re.compile(r"^(?P<indent>(?:  )*)(?P<name>\S+)(?:\s{2,}\S.*)?$")


def readme() -> str:
    return text_of("README.md") or ""


def listed_paths() -> list[str]:
    """Return the paths of the tree: two spaces a level, a folder ends with a slash, two spaces before a remark."""
    block = TREE.search(readme())
    assert block, "README.md has no ```text block after <!-- tree -->"
    paths: list[str] = []
    folders: list[str] = []
    for line in block.group(1).splitlines():
        entry = ENTRY.match(line)
        assert entry, f"not a line of the tree: {line!r}"
        del folders[len(entry["indent"]) // 2 :]
        paths.append("".join(folders) + entry["name"])
        if entry["name"].endswith("/"):
            folders.append(entry["name"])
    return paths


def test_every_listed_path_exists() -> None:
    missing = [path for path in listed_paths() if not (ROOT / path).exists()]
    assert not missing, f"in README's tree, not in the repository: {missing}"


def test_every_file_is_listed() -> None:
    """A file is listed or lies below a folder that is listed without children; __init__.py goes without saying."""
    listed = set(listed_paths())
    leaves = {
        path for path in listed if path.endswith("/") and not any(p.startswith(path) and p != path for p in listed)
    }
    unlisted = [
        name
        for name in repository_files()
        if name not in listed
        and not any(name.startswith(leaf) for leaf in leaves)
        and PurePosixPath(name).name != "__init__.py"
    ]
    assert not unlisted, f"in the repository, not in README's tree: {unlisted}"


def test_relative_links_lead_somewhere() -> None:
    found = []
    for name in repository_files():
        if name.endswith(".md"):
            for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text_of(name) or ""):
                if not (ROOT / PurePosixPath(name).parent / target).exists():
                    found.append(f"{name}: {target}")
    assert not found, "\n".join(found)


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile") or "", re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(re.findall(r"`[^`]+`|^make .*", readme(), re.MULTILINE)))
    )
    assert not named - targets


def test_the_first_screen_says_what_it_is_and_how_to_run_it() -> None:
    first_lines = "\n".join(readme().splitlines()[:40])
    for wanted in ("Mix-MoE", "2605.24681", "make setup", "make quickstart"):
        assert wanted in first_lines, f"README's first 40 lines lack {wanted!r}"
