"""report.md as one HTML page that needs no other file: pictures inside, readable on a phone."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import markdown

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #222; } img { background: #fff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; border-bottom: 1px solid var(--line); margin-top: 2.2rem; }
img { max-width: 100%; height: auto; } img.wide { min-width: 44rem; }
.table, p:has(> img) { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top; }
th { background: var(--soft); text-align: left; vertical-align: bottom; } td { white-space: nowrap; }
td:nth-child(2):last-child { white-space: normal; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; font-size: .85rem; }
"""
_PNG_WIDTH = slice(16, 20)  # of the file's bytes: pixels, big-endian
_PHONE_PIXELS = 1000  # the lettering of a wider picture cannot be read when it is shrunk to a phone's width
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


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
    return _PAGE.format(title=title, style=_STYLE, body=body)
