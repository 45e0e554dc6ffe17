"""No source file over 400 lines, no function over 60, no command over 120."""

from __future__ import annotations

from tests.repo.sources import COMMAND_FOLDERS, RULES, files_ending, functions_of, text_of

FILE_LIMIT, FUNCTION_LIMIT, COMMAND_LIMIT = 400, 60, 120
LINE_LIMIT = 120  # ruff looks after Python; this is for shell, make and TOML


def line_count(name: str) -> int:
    return len((text_of(name) or "").splitlines())


def test_files_are_short() -> None:
    sizes = {name: line_count(name) for name in files_ending(".py", ".sh")}
    too_long = {name: size for name, size in sizes.items() if size > FILE_LIMIT}
    assert not too_long, f"over {FILE_LIMIT} lines: {too_long}"


def test_commands_are_thin() -> None:
    sizes = {name: line_count(name) for folder in COMMAND_FOLDERS for name in files_ending(".py", below=f"{folder}/")}
    too_long = {name: size for name, size in sizes.items() if size > COMMAND_LIMIT}
    assert not too_long, f"over {COMMAND_LIMIT} lines (move code into the package): {too_long}"


def test_functions_are_short() -> None:
    too_long = [
        f"{name}:{function.lineno} {function.name}: {length} lines"
        for name in files_ending(".py")
        for function in functions_of(name)
        if (length := (function.end_lineno or function.lineno) - function.lineno + 1) > FUNCTION_LIMIT
    ]
    assert not too_long, f"over {FUNCTION_LIMIT} lines:\n" + "\n".join(too_long)


def test_lines_are_short() -> None:
    too_long = [
        f"{name}:{number}"
        for name in [*files_ending(".sh", ".toml"), "Makefile", ".ci/run"]
        for number, line in enumerate((text_of(name) or "").splitlines(), start=1)
        if len(line) > LINE_LIMIT and not name.startswith(RULES)
    ]
    assert not too_long, f"over {LINE_LIMIT} characters: {too_long}"
