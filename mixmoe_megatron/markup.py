"""Text of users inside Markdown and LaTeX: shown as it is, never taken for markup."""

from __future__ import annotations

import re

#: what means something in Markdown where it stands: an underscore between letters, a < before a blank mean themselves
_MARKDOWN = re.compile(r"[\\`*|~$]|\](?=[(\[])|&(?=[#\w]+;)|<(?=[\w/!?])|(?<![^\W_])_|_(?![^\W_])")
_MARKDOWN_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    "~": "&#126;",
    "$": "&#36;",
}  # a backslash is not enough in every dialect
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", **{sign: f"\\{sign}" for sign in "{}$&#_%"},
}  # fmt: skip


class Markdown(str):
    """Text that is Markdown already: `tables.table` takes it as it is."""


def escape_markdown(text: str) -> Markdown:
    """Return Markdown that shows a text; line breaks become blanks."""
    line = " ".join(text.splitlines())
    return Markdown(_MARKDOWN.sub(lambda found: _MARKDOWN_ENTITIES.get(found[0], f"\\{found[0]}"), line))


def bold(text: str) -> Markdown:
    """Return Markdown that shows a text in bold."""
    return Markdown(f"**{escape_markdown(text)}**")


def code_span(text: str) -> Markdown:
    """Return Markdown that shows a text as code; line breaks become blanks."""
    line = " ".join(text.splitlines())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    margin = " " if "`" in line else ""
    return Markdown(f"{fence}{margin}{line}{margin}{fence}")


def escape_latex(text: str) -> str:
    """Return LaTeX that shows a text; line breaks become blanks."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.splitlines()))
