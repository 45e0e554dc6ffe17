"""model/README.md: every file of the room is on its map, and every deviation that a docstring names is in its table."""

from __future__ import annotations

import re

from tests.repo.sources import PACKAGE, files_ending, text_of

ROOM = f"{PACKAGE}/model/"


def rows() -> list[str]:
    return re.findall(r"^\| (D\d+) \|", text_of(ROOM + "README.md") or "", re.MULTILINE)


def test_the_map_names_every_file_once() -> None:
    mapped = re.findall(r"^\|(?: \d+ \|)? `(\w+\.py)` \|", text_of(ROOM + "README.md") or "", re.MULTILINE)
    files = [name.removeprefix(ROOM) for name in files_ending(".py", below=ROOM) if not name.endswith("__init__.py")]
    assert sorted(mapped) == sorted(files)


def test_decisions_are_numbered_and_references_lead_to_them() -> None:
    assert rows() == [f"D{number}" for number in range(1, len(rows()) + 1)] != []
    for name in files_ending(".py", below=f"{PACKAGE}/"):
        for sentence in re.findall(r"Deviates: ([^.]*)", text_of(name) or ""):
            named = re.findall(r"\bD\d+\b", sentence)
            assert named and set(named) <= set(rows()), f"{name}: Deviates: {sentence}"
