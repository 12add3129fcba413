"""Charts as SVG inside a page, in the colours of its style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .page import escape, keys

WIDTH, HEIGHT = 480, 266
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
WITH_DOTS = 60  # points of a line up to which each has a dot


class Line(NamedTuple):
    """A line of a chart. colour: in CSS. points: x and y; those that are not finite are left out."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


class Scale(NamedTuple):
    """Numbers of one axis, from `low` to `high`, to places from `first` to `last`."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return self.first + (self.last - self.first) * (value - self.low) / (self.high - self.low)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers that enclose `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= count)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(title: str, lines: Sequence[Line], x_label: str = "epoch", mark: float | None = None) -> str:
    """A figure with lines over whole numbers such as epochs; `mark`: a place to point out."""
    kept = [line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs, ys = zip(*(point for line in kept for point in line.points), strict=True)
    x_ticks = [x for x in ticks(min(xs), max(xs), 6, whole=True) if min(xs) <= x <= max(xs)] or [min(xs)]
    y_ticks = ticks(min(ys), max(ys))
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = _grid(y_ticks, y)
    parts += [f'<text x="{x(v):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{v:g}</text>' for v in x_ticks]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    if mark is not None and min(xs) <= mark <= max(xs):
        parts.append(
            f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)"'
            f' stroke-dasharray="3 3"><title>{escape(x_label)} {mark:g}</title></line>'
        )
    for line in kept:
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        if len(line.points) <= WITH_DOTS:
            parts += [
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{line.colour}">'
                f"<title>{escape(line.name)}, {escape(x_label)} {a:g}: {b:.4f}</title></circle>"
                for a, b in line.points
            ]
    return _figure(title, HEIGHT, parts, {line.name: line.colour for line in kept})


def dot_chart(title: str, groups: Mapping[str, Sequence[float]], colours: Mapping[str, str], x_label: str) -> str:
    """A figure with a row per group, under its name: a dot for each of its values, a bar at their mean."""
    values = [value for group in groups.values() for value in group]
    places, left, row = ticks(min(values), max(values)), 12, 52
    height = TOP + row * len(groups) + BOTTOM
    x = Scale(places[0], places[-1], left, WIDTH - RIGHT - 12)
    parts = [
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{TOP}" y2="{height - BOTTOM}" stroke="var(--line)"/>'
        f'<text x="{x(v):.1f}" y="{height - 22}" text-anchor="middle">{round(v, 10):g}</text>'
        for v in places
    ]
    parts.append(f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{height - 2}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (name, group) in enumerate(groups.items()):
        y, mean = TOP + row * index + 34, sum(group) / len(group)
        parts.append(f'<text class="strong" x="{left + 6}" y="{y - 16}">{escape(name)}</text>')
        parts.append(
            f'<rect x="{x(mean) - 1.5:.1f}" y="{y - 9:.1f}" width="3" height="18" rx="1.5" fill="{colours[name]}">'
            f"<title>{escape(name)}: mean {mean:.4f}</title></rect>"
        )
        parts += [
            f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="4" fill="{colours[name]}" fill-opacity="0.55">'
            f"<title>{escape(name)}: {value:.4f}</title></circle>"
            for value in group
        ]
    return _figure(title, height, parts, {})


def _grid(places: Sequence[float], y: Scale) -> list[str]:
    return [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{round(v, 10):g}</text>'
        for v in places
    ]


def _figure(title: str, height: float, parts: Sequence[str], names: Mapping[str, str]) -> str:
    head = f"<h3>{escape(title)}</h3>{keys(names)}"
    drawing = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure>{head}{drawing}</figure>"
