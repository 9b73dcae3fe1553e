"""Owns HTML pages that need nothing but themselves: no scripts, no outside files, light and dark."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --best: #d55e00; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .3rem .45rem; }
th, td { border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.best td { font-weight: 600; } tr.best td:first-child { box-shadow: inset 3px 0 var(--best); }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
table.texts td { white-space: pre-wrap; text-align: left; vertical-align: top; min-width: 9rem; }
table.texts th { text-align: left; }
table.texts td > div { max-height: 9rem; overflow: auto; }
table.numbers :is(td, th):nth-child(2) { text-align: right; }
figcaption, .note { font-size: .85rem; opacity: .8; } .verdict { font-size: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dd { margin: 0; word-break: break-word; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Put a whole document together."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title>"
        f"<style>{_STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None, kind: str = ""
) -> str:
    """Lay out rows under their heads, one of them marked as the best. `kind`: a class of the style sheet."""
    lines = ["<tr>" + "".join(f"<th>{text(head)}</th>" for head in heads) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="best"' if number == best else ""
        cells = (f"<div>{text(cell)}</div>" if kind == "texts" else text(cell) for cell in row)
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def figure(picture: str, caption: str) -> str:
    """Frame a picture (inline SVG) with its caption."""
    words = text(caption)
    return f'<figure role="img" aria-label="{words}">{picture}<figcaption>{words}</figcaption></figure>'


def facts(found: Mapping[str, Any]) -> str:
    """List names and what they are."""
    return (
        "<dl>"
        + "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in found.items())
        + "</dl>"
    )


def number(value: float | None) -> str:
    """Write four digits, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def text(value: Any) -> str:
    """Escape a value for HTML."""
    return html.escape(str(value))
