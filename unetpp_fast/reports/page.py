"""The frame of a page: its style, for light and dark screens, its tables, figures and rows of pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.atomic_files import write_atomic
from ..common.extras import need
from ..common.version import __version__

LONGEST = 320  # pixels of a picture's longer side
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --text: #1d232b; --soft: #66707c; --line: #dde1e6;
  --ours: #d9483b; --other: #8793a0; --third: #2f7fd0; --fourth: #d39a1b; --fifth: #3f9c6b;
  --wrong: 217, 72, 59; --right: 47, 127, 208; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --text: #e6e9ed; --soft: #98a2ae;
  --line: #323942; --ours: #ff7062; --other: #8f9ba8; --third: #69b1ff; --fourth: #f0bd4d; --fifth: #6fce9c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { margin: 0 0 12px; }
.soft, footer, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile { background: var(--card); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 14px 16px 10px; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { fill: var(--soft); font-size: 12px; }
figure svg text.strong { fill: var(--text); }
figure h3 { margin: 0 0 6px; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.key { display: inline-block; margin: 0 14px 0 0; font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
.key i.square { height: 10px; width: 10px; box-shadow: 0 0 0 1px var(--line); }
.example { margin: 0 0 14px; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
.panels img { width: 100%; display: block; border-radius: 4px; image-rendering: auto; }
.panels span { font-size: 12px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; padding: 5px 14px; }
dl.facts { columns: 2 300px; column-gap: 40px; margin: 0; }
.facts div { display: flex; gap: 14px; padding: 5px 0; border-bottom: 1px solid var(--line); break-inside: avoid; }
.facts dt { flex: 0 0 150px; color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
table.matrix td { min-width: 64px; }
footer { margin: 48px 0 0; font-size: 13px; }
@media (max-width: 560px) {
  .panels { grid-template-columns: repeat(2, 1fr); }
  figure svg text { font-size: 17px; }
  th, td { padding-right: 8px; }
  td.number, th.number { padding: 5px 6px; }
  td.number { white-space: nowrap; }
  table.matrix td { min-width: 0; }
}
@media print { body { background: #fff; } }
"""


def escape(text: object) -> str:
    """Text for HTML, in content and attributes."""
    return html.escape(str(text))


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page.

    Args:
        sections: heading (plain text; "" for none) and HTML of each; those without content are left out.
    """
    parts = [f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}{body}</section>" for head, body in sections if body]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(subtitle)}</p></header>\n' + "\n".join(parts) + "\n"
        f"<footer>Written by unetpp_fast {escape(__version__)}. This file needs nothing beside it.</footer>\n</main>\n"
        "</body>\n</html>\n"
    )


def write(path: Path, text: str) -> None:
    """Writes a page, atomically."""
    write_atomic(path, lambda stream: stream.write(text.encode()))


def tiles(values: Mapping[str, str]) -> str:
    """Figures with what they mean under them."""
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in values.items())
    return f'<div class="tiles">{shown}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers; no head for ()."""
    kinds = ["", *(' class="number"' for _ in range(max(map(len, [head, *rows]), default=1) - 1))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=False))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(value)}</td>" for value, kind in zip(row, kinds, strict=False)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if head else ""}{body}</table></div>' if rows else ""


def facts(values: Mapping[str, object]) -> str:
    """Names and texts in columns; empty values are left out."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
        if value not in (None, "")
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def matrix(names: Sequence[str], counts: Sequence[Sequence[float]]) -> str:
    """A confusion matrix: in row i and column j the share of class i that was taken for class j."""
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    lines = []
    for place, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = sum(row)
        cells = "".join(
            f'<td class="number" title="{int(value):,} pixels" style="background:rgba(var(--'
            f'{"right" if place == column else "wrong"}),{0.55 * value / total if total else 0:.3f})">'
            f"{f'{value / total:.1%}' if total else ''}</td>"
            for column, value in enumerate(row)
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    body = f'<tr><th class="soft">truth ↓ predicted →</th>{head}</tr>{"".join(lines)}'
    return f'<div class="scroll"><table class="matrix">{body}</table></div>'


def picture(values: np.ndarray, alt: str) -> str:
    """An image inside the page, from uint8 `[H, W, 3]`; large ones are made smaller."""
    image = need("PIL.Image", "commands").fromarray(np.ascontiguousarray(values))
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def example(caption: str, panels: Mapping[str, np.ndarray]) -> str:
    """Pictures of one image side by side, uint8 `[H, W, 3]` each, with their names under them."""
    shown = "".join(
        f"<div>{picture(values, f'{caption}: {name}')}<span>{escape(name)}</span></div>" for name, values in panels.items()
    )
    return f'<figure class="example"><h3>{escape(caption)}</h3><div class="panels">{shown}</div></figure>'


def keys(names: Mapping[str, str], square: bool = False) -> str:
    """The legend of a figure: names and their CSS colours."""
    kind = ' class="square"' if square else ""
    return "".join(f'<span class="key"><i{kind} style="background:{c}"></i>{escape(n)}</span>' for n, c in names.items())
