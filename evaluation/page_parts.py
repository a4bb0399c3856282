"""What all pages are made of: the frame with its style, drawn figures, tables, escaped words."""

from __future__ import annotations

import html
import shlex
import sys
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 45rem; } .headline { font-size: 1.15rem; }
.warning { border-left: .4rem solid #D55E00; padding: .3rem .8rem; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } tr.shown td { font-weight: 600; }
td.words, th.words { text-align: left; white-space: normal; min-width: 12rem; }
.note { color: #555; font-size: .85rem; }
@media print { body { max-width: none; } section { break-inside: avoid; } .modebar { display: none !important; } }
"""


def frame(title: str, body: str, command: str) -> str:
    """A whole page, self-contained: plotly is inside, it needs no network."""
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        + body
        + f'<p class="note">Made by <code>{text(command)}</code></p></body></html>\n'
    )


def drawn(figure: Any, key: str) -> str:
    """A plotly figure as a place in a page."""
    made = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=key, config={"displayModeBar": False, "responsive": True}
    )
    return str(made)


def section(title: str, *parts: str) -> str:
    """A titled part of a page; `parts` are HTML."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def paragraph(words: str, kind: str = "") -> str:
    """Plain words."""
    return f"<p{f' class={kind}' if kind else ''}>{text(words)}</p>"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: set[str] | None = None,
    words_columns: Sequence[int] = (),
) -> str:
    """A table that scrolls sideways on a phone; rows whose first cell is `marked` are bold."""
    head = "".join(f"<th{' class=words' if i in words_columns else ''}>{text(x)}</th>" for i, x in enumerate(heads))
    lines = []
    for row in rows:
        cells = "".join(f"<td{' class=words' if i in words_columns else ''}>{text(x)}</td>" for i, x in enumerate(row))
        bold = row[0].removesuffix(" *") in (marked or ())
        lines.append(f"<tr{' class=shown' if bold else ''}>{cells}</tr>")
    body = "".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text(words: object) -> str:
    """Words that cannot break a page."""
    return html.escape(str(words))


def command_line() -> str:
    """The command that is running, for the foot of a page."""
    return shlex.join(["python", "evaluate.py", *sys.argv[1:]])
