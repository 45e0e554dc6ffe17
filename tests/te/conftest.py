"""These tests run where Transformer Engine is: `make test-te` builds an environment with it. Elsewhere they skip."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
NOT_SHOWN = (
    "Not shown, it needs a GPU: that Transformer Engine's kernels run, that their numbers agree with the torch path, "
    "and how fast they are. Shown: structure, freezing, checkpoints, conversion."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-te", action="store_true", help="fail instead of skipping without Transformer Engine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAVE_TE:
        return
    if config.getoption("--require-te", default=False):
        raise pytest.UsageError("Transformer Engine is not installed here: run `make test-te`.")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: `make test-te` builds it"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if HAVE_TE:
        terminalreporter.write_line(NOT_SHOWN)
