"""report.md as one HTML page that needs no other file: pictures inside, readable on a phone."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from string import Template

import markdown

_PNG_WIDTH = slice(16, 20)  # of the file's bytes: pixels, big-endian
_PHONE_PIXELS = 1000  # the lettering of a wider picture cannot be read when it is shrunk to a phone's width
_PAGE = "page.html"  # beside this file: the page around a title and a body


def render_html(text: str, pictures: Path) -> str:
    """Turn a report into a page.

    Args:
        text: Markdown of `report.render_report`; HTML in it is shown as text.
        pictures: Directory of the PNG files that it names.

    Raises:
        FileNotFoundError: A picture is missing.
    """
    converter = markdown.Markdown(extensions=["tables", "sane_lists"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = converter.convert(text)
    heading = re.search("<h1>(.*?)</h1>", body)
    title = re.sub("<[^>]*>", "", heading[1]) if heading else "Report"
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")

    def embed(match: re.Match[str]) -> str:
        data = (pictures / html.unescape(match[2])).read_bytes()
        kind = ' class="wide"' if int.from_bytes(data[_PNG_WIDTH]) > _PHONE_PIXELS else ""
        return f'{match[1]}src="data:image/png;base64,{base64.b64encode(data).decode()}"{kind}'

    body = re.sub(r'(<img [^>]*)src="([^":]+\.png)"', embed, body)
    page = Path(__file__).with_name(_PAGE).read_text(encoding="utf-8")
    return Template(page).substitute(title=title, body=body)
