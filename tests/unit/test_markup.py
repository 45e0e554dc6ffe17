"""Text and names of users in tables, pages, LaTeX and pictures: shown as they are, never taken for markup."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import pytest

from mixmoe_megatron.checkpoint.hf_files import model_card
from mixmoe_megatron.checkpoint.metadata import Metadata
from mixmoe_megatron.markup import bold, code_span, escape_latex, escape_markdown
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.study.comparison import latex_comparison, markdown_comparison
from mixmoe_megatron.study.figures import draw_scores
from mixmoe_megatron.study.html_report import render_html
from mixmoe_megatron.study.report import ReportInputs, render_report, write_report
from mixmoe_megatron.study.tables import table
from mixmoe_megatron.study.transfer import markdown_transfer, transfer_matrix

TEXTS = [
    'Klick <script>document.title="x"</script>',
    "Use <your name> & _it_ [link](http://x) &lt;b&gt; &copy;",
    "a | b \\| c \\ d \\\\| e",
    "`code` ``more` **bold** *one* __init__ snake_case _x ~~gone~~",
    '![picture](scores.png) <img src="secret.png"> src="secret.png"',
    "<!-- comment --> <http://auto.link> [x]: y # no heading - 1. > quote",
    "$x^2$ \\(y\\) {braces} %comment",
    "\\",
]


class Cells(HTMLParser):
    """The text of each table cell, and the tags and attributes of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
        self.inside = tag == "td" or self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_shows_its_text(tmp_path: Path, text: str) -> None:
    source = table(["text", "other"], [[text, "x"], [bold(text), text]], text_columns=2)
    for page in (render_html(source, tmp_path), markdown.markdown(source, extensions=["tables"])):
        found = Cells(page)
        assert found.cells == [text, "x", text, text]
        page_tags = {"html", "head", "meta", "title", "style", "body", "div"}
        assert set(found.tags) <= page_tags | {"table", "thead", "tbody", "tr", "th", "td", "strong"}


@pytest.mark.parametrize("text", TEXTS)
def test_a_paragraph_shows_its_text(text: str) -> None:
    page = markdown.markdown(f"Before: {escape_markdown(text)}, after.", extensions=["tables"])
    assert html.unescape(page) == f"<p>Before: {text}, after.</p>"
    assert html.unescape(markdown.markdown(f"Before: {code_span(text)}")) == f"<p>Before: <code>{text}</code></p>"


@pytest.mark.parametrize("text", TEXTS)
def test_a_model_card_shows_its_texts(text: str) -> None:
    """The card's names come from metadata and file names that others may have written."""
    data = {"phase": text, "prefix": text, "kind": text, "tokens": 1, "manifest_sha256": text}
    parent = {"phase": text, "weights_xxh128": "00"}
    card = model_card(Metadata(PHASES["dense"], None, {}, {}, parent, {}, text, [data]), text, 7)
    found = Cells(markdown.markdown(card.split("---\n", 2)[2], extensions=["tables"]))
    assert [cell for cell in found.cells if text in cell] == [text, f"{text}, weights xxh128 00", *[text] * 5]
    assert set(found.tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td"}


def test_lines_cannot_be_broken() -> None:
    text = "one\n\n# two\r| three\u2028- four"
    assert len(f"{escape_markdown(text)}{code_span(text)}{escape_latex(text)}".splitlines()) == 1


def test_dollars_are_no_formula() -> None:
    """Some readers of Markdown set what stands between two of them as TeX."""
    assert "$" not in escape_markdown("from $5 to $x$")


def test_plain_names_stay_readable() -> None:
    for name in ("de-en@wmt17", "my_model_2", "Größe (alt)", "x.y", "50 %", "中_文", "[+1, -2]", "p < 0.1", "R&D & co"):
        assert escape_markdown(name) == name


def test_latex() -> None:
    assert escape_latex(r"a_b & 5% $x^2$ {y} \z ~#<") == (
        r"a\_b \& 5\% \$x\textasciicircum{}2\$ \{y\} \textbackslash{}z \textasciitilde{}\#\textless{}"
    )


NAMES = ("_base_", "__a__", "m_1")
DIRECTIONS = ("de-en@my_set", "de-en@__x__")


def evaluation() -> dict[str, Any]:
    """What an evaluation with odd, but allowed, names of systems and test sets gives."""
    scores = {name: {"bleu": 1.0, "chrf": 2.0 + rank, "chrf_plus_plus": 3.0} for rank, name in enumerate(NAMES)}
    test = {"baseline": NAMES[0], "bleu_difference": 1.0, "bleu_p_value": 0.01, "chrf_difference": 1.0,
            "chrf_p_value": 0.01, "chrf_interval": 0.1, "chrf_baseline_interval": 0.1, "signatures": {}}  # fmt: skip
    return {
        "baseline": NAMES[0], "systems": dict.fromkeys(NAMES, "models/x"), "perplexity": {}, "routing": {},
        "directions": {name: scores for name in (*DIRECTIONS, "de-fi")},
        "num_test_segments": dict.fromkeys((*DIRECTIONS, "de-fi"), 2),
        "signatures": {"de-en@my_set": {"comet": "my `model`|<b>|unbabel-comet:2"}},
        "significance": {name: dict.fromkeys(NAMES[1:], test) for name in (*DIRECTIONS, "de-fi")},
        "seconds": {}, "options": {"prompt_template": "<b>{source}</b>\n[x](y)", "dtype": "float32"},
        "versions": {}, "commit": None,
    }  # fmt: skip


def test_names_in_reports(tmp_path: Path) -> None:
    (tmp_path / "hypotheses").mkdir()
    for direction in (*DIRECTIONS, "de-fi"):
        for name in ("source", "reference", *NAMES):
            (tmp_path / "hypotheses" / f"{direction}.{name}.txt").write_text(f"{TEXTS[0]}\n{TEXTS[1]}\n", "utf-8")
    inputs = ReportInputs(
        evaluation(), seconds={"<i>step</i>": 1.0}, pair="<u>de</u>", hypotheses_dir=tmp_path / "hypotheses"
    )
    write_report(inputs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    tags = set(Cells(page).tags)
    assert not tags & {"script", "your", "i", "b", "u", "a", "em"}
    assert "<title>Mix-MoE report: &lt;u&gt;de&lt;/u&gt;</title>" in page
    for shown in (
        *NAMES,
        *DIRECTIONS,
        "my `model`|<b>|unbabel-comet:2",
        r"'<b>{source}</b>\n[x](y)'",
        "<i>step</i>",
        *TEXTS[:2],
    ):
        assert shown in html.unescape(page), shown
    assert page.count('src="data:image/png') == page.count("<img") == 1


def test_names_in_the_papers_table() -> None:
    text = latex_comparison(evaluation())
    assert r"\multicolumn{3}{c}{DE-EN@MY\_SET}" in text
    assert r"\_base\_ & " in text and r"\_\_a\_\_ & " in text
    assert not re.search(r"(?<!\\)[_%$#^]", text)
    assert "**4.0**" in markdown_comparison(evaluation())


def test_names_in_a_transfer_matrix() -> None:
    matrix = transfer_matrix(evaluation(), {"__a__": "de-en", "m_1": "de-fi"})
    page = html.unescape(markdown.markdown(markdown_transfer(matrix), extensions=["tables"]))
    for shown in ("Mean gain over _base_", "de-en (__a__)", "<strong>+1.0</strong>", "de-en@__x__ 2"):
        assert shown in page


def test_a_systems_name_is_in_the_legend_and_no_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib leaves labels that begin with _ out, and sets what stands between $ as mathematics."""
    seen = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: (seen.append(figure), path.touch())
    )
    draw_scores(evaluation(), tmp_path / "scores.png")
    labels = [text.get_text().strip() for text in seen[0].legends[0].get_texts()]
    assert labels == list(NAMES)
    from matplotlib.text import Text

    assert not any(text.get_parse_math() for text in seen[0].findobj(Text))


def test_report_text_of_two_equal_systems() -> None:
    """What differs by nothing that shows is neither better nor worse, whatever an older evaluation.json says of it."""
    value = evaluation()
    for tests in value["significance"].values():
        value["significance"] = {name: {s: {**t, "chrf_difference": -0.001, "chrf_p_value": 0.001}
                                        for s, t in tests.items()} for name in value["significance"]}  # fmt: skip
    text = render_report(ReportInputs(value))
    assert " worse " not in text and " better " not in text
    assert r"m_1 is not distinguishable from \_base\_ by chrF (0.00, paired bootstrap p = 0.001)" in text
