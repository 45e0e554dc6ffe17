"""The papers of the house are true: maps of rooms, phases, import rules and pictures are what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from types import ModuleType

import pytest

from mixmoe_megatron.methods.registry import METHODS, STAGES
from tests.repo.sources import PACKAGE, ROOT, files_ending, repository_files, text_of
from tests.repo.test_imports import ALLOWED, FORBIDDEN, MODEL_CODE, ON_MEGATRON_TRAINING

MAP = f"{PACKAGE}/README.md"
PAPERS = ("README.md", "CONTRIBUTING.md", MAP, f"{PACKAGE}/model/README.md", "tests/README.md", "examples/LOG.md")
README_LIMIT = 150


def paper(name: str) -> str:
    text = text_of(name)
    assert text, f"{name} is missing"
    return text


def section(title: str) -> str:
    """Return a section of the map, from its heading to the next one of any depth."""
    found = re.search(rf"^##+ {title}\n(.*?)(?=^##|\Z)", paper(MAP), re.MULTILINE | re.DOTALL)
    assert found, f"{MAP} has no section {title}"
    return found[1]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def joined(names: Iterable[str], code: bool = False) -> str:
    return ", ".join(f"`{name}`" if code else name for name in names) or "none"


def import_rules() -> list[str]:
    """Return the rules of test_imports.py as lines of Markdown tables."""
    lines = ["| files | may not import | but may |", "|---|---|---|"]
    for pattern, forbidden, exceptions in FORBIDDEN:
        names = [name for name in forbidden if name not in MODEL_CODE]
        model_code = ", model code" if len(names) < len(forbidden) else ""
        lines.append(f"| `{pattern}` | {joined(names, code=True)}{model_code} | {joined(exceptions, code=True)} |")
    lines += ["", "| files | may import, beside Python's own |", "|---|---|"]
    lines += [f"| `{pattern}` | {joined(allowed, code=True)} |" for pattern, allowed in ALLOWED]
    on_training = joined(ON_MEGATRON_TRAINING, code=True)
    return [*lines, "", f"Only {on_training} import `megatron.training` and `{PACKAGE}.training`."]


def test_papers_are_there() -> None:
    examples = {PurePosixPath(name).parts[1] for name in repository_files() if re.match(r"examples/[^/]+/", name)}
    folders = ["checkpoints_conversion", "tools", "examples", "tests/distributed", "tests/gpu"]
    wanted = [*PAPERS, *(f"{folder}/README.md" for folder in folders), *(f"examples/{e}/README.md" for e in examples)]
    assert not [name for name in wanted if not text_of(name)]


def test_readme_is_short() -> None:
    assert len(paper("README.md").splitlines()) <= README_LIMIT


def test_the_map_has_every_room_and_every_file_beside_the_rooms() -> None:
    inside = [PurePosixPath(name).relative_to(PACKAGE) for name in files_ending(".py", below=f"{PACKAGE}/")]
    rooms = {f"{path.parts[0]}/" for path in inside if len(path.parts) > 1}
    files = {path.name for path in inside if len(path.parts) == 1} - {"__init__.py"}
    listed = first_cells(section("Rooms"))
    assert sorted(listed) == sorted(rooms | files)


def test_files_that_the_map_names_are_there() -> None:
    named = set(re.findall(r"`([\w/]+/\w+\.(?:py|md)|\w+/)`", paper(MAP)))
    missing = [name for name in named if not ((ROOT / PACKAGE / name).exists() or (ROOT / name).exists())]
    assert named and not missing


def test_the_reading_order_is_of_ten_files() -> None:
    listed = re.findall(r"^(\d+)\. `([^`]+)`", section("Ten files in a reading order"), re.MULTILINE)
    assert [number for number, _ in listed] == [str(number) for number in range(1, 11)]
    assert all((ROOT / PACKAGE / file).is_file() for _, file in listed)


def test_the_phases_are_those_of_the_registry() -> None:
    rows = [
        f"| `{phase.name}` | `{method.name}` | {joined(phase.trains) if phase.trains else 'nothing'} | "
        f"{joined(phase.starts_from, code=True)} | {joined(phase.data)} |"
        for method in METHODS.values()
        for phase in method.phases
    ]
    assert [line for line in section("Phases").splitlines() if line.startswith("| `")] == rows
    numbers, names = [str(number) for number in STAGES], [f"`{phase.name}`" for phase in STAGES.values()]
    told = f"`--mixmoe-stage` {', '.join(numbers[:-1])} and {numbers[-1]} train {', '.join(names[:-1])} and {names[-1]}"
    assert told in " ".join(section("Phases").split())


def test_import_rules_are_those_of_the_test() -> None:
    told, rules = paper(MAP).partition("<!-- imports -->\n")[2], "\n".join(import_rules())
    assert told.split() == rules.split(), f"the map should say:\n{rules}"


def drawing() -> ModuleType:
    """Import the script that draws the pictures."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_pictures", ROOT / "examples/pictures/draw.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_results_shows_the_tables_of_today() -> None:
    from PIL import Image

    with Image.open(ROOT / "examples/pictures/results.png") as picture:
        drawn = json.loads(picture.info["Description"])
    assert drawn == drawing().figures(), "make pictures"


def test_the_first_screen_has_the_quickstarts_own_figures() -> None:
    rows = [
        line for line in paper("examples/quickstart/README.md").splitlines() if re.match(r"\| .* \d+\.\d \|$", line)
    ]
    assert len(rows) == 3 and all(row in paper("README.md").splitlines()[:40] for row in rows)
