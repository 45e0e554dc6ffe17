"""Nothing in the repository depends on the machine it was written on, and packaging says what is true."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.repo.sources import PACKAGE, ROOT, RULES, repository_files, text_of

MACHINE_PATH = re.compile(r"(?<![\w.}\])*])/(home|Users|root|tmp|mnt|work|workspace)/\w|\.pyenv/(versions|shims)/\w")
REGISTRY = re.compile(
    r"pypi\.(org|python)|pythonhosted|download\.pytorch\.org|conda\.anaconda|--(extra-)?index-url|--find-links"
)
NOT_OURS = (RULES, "examples/data/", "LICENSE")


def violations(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name in repository_files()
        if not name.startswith(NOT_OURS)
        for number, line in enumerate((text_of(name) or "").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_machine_path() -> None:
    assert not (found := violations(MACHINE_PATH)), "\n".join(found)


def test_no_registry_host() -> None:
    assert not (found := violations(REGISTRY)), "\n".join(found)


@pytest.mark.parametrize(
    "text", ["cd /workspace/x", "'/root/x'", "=/tmp/ann/x", "/home/ann/x", "~/.pyenv/versions/3.12"]
)
def test_the_machine_path_pattern_finds(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ['"$root"/versions/3.12*/bin', "https://host/work/x", "`$(pyenv root)/versions`", "network/root.py"]
)
def test_the_machine_path_pattern_lets_pass(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_ci_reaches_no_host_of_its_own() -> None:
    assert "://" not in (text_of(".ci/run") or "")


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "te"]
    names = {re.split(r"[\[<>=!~ ]", line)[0] for line in sum(extras, project["dependencies"])} - {project["name"]}
    lines = [line for line in (text_of("constraints.txt") or "").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert not names - pinned


def test_gpu_machines_get_the_pinned_versions() -> None:
    lines = [line for line in (text_of("tests/gpu/packages.txt") or "").splitlines() if not line.startswith("#")]
    assert lines
    assert not set(lines) - set((text_of("constraints.txt") or "").splitlines())


def test_changelog_names_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.search(rf"^## \[?{re.escape(version)}\]?", text_of("CHANGELOG.md") or "", re.MULTILINE)
    in_package = re.search(r'__version__ = "(.*)"', text_of(f"{PACKAGE}/__init__.py") or "")
    assert in_package is None or in_package[1] == version
