"""The figures of docs/architecture.md: `python docs/draw.py` writes docs/figures/*.svg.

Each file names the hash of this script, so that a test notices when one was not drawn anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

OUT = Path(__file__).parent / "figures"
HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
PREFIX, LOW, NODE, EMPTY, INK = "#9ecae1", "#fdae6b", "#31a354", "#eeeeee", "#333333"
LOW_PIXELS = ("#fdd0a2", "#9ecae1", "#c7e9c0", "#dadaeb")


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", size: float = 9) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, colour: str = INK) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, connectionstyle=style, color=colour))


def blank(axes: Axes, title: str, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_title(title, fontsize=10, loc="left")
    axes.axis("off")


def colour_of(level: int, column: int) -> str:
    """What X(0,2) reads and writes, in the figure of level buffers."""
    if (level, column) == (0, 2):
        return NODE
    return PREFIX if level == 0 and column < 2 else LOW if (level, column) == (1, 1) else EMPTY


def nodes(axes: Axes) -> None:
    blank(axes, "the network", 6.5, 6.2)
    at = {(i, j): (0.9 + 1.5 * j + 0.75 * i, 4.8 - 1.4 * i) for i in range(4) for j in range(4 - i)}
    for (i, j), (x, y) in at.items():
        if j:
            for k in range(j):
                wanted = (i, j) == (0, 2)
                start = at[i, k]
                arrow(
                    axes,
                    (start[0] + 0.38, start[1]),
                    (x - 0.38, y),
                    -0.28 * (j - k - 1) ** 0.7,
                    INK if wanted else "#cccccc",
                )
            low = at[i + 1, j - 1]
            arrow(axes, (low[0] + 0.2, low[1] + 0.32), (x - 0.2, y - 0.32), 0, INK if (i, j) == (0, 2) else "#cccccc")
        elif i:
            above = at[i - 1, 0]
            arrow(axes, (above[0] + 0.2, above[1] - 0.32), (x - 0.2, y + 0.32), 0, "#cccccc")
    for (i, j), (x, y) in at.items():
        box(axes, x - 0.38, y - 0.3, 0.76, 0.6, colour_of(i, j), f"X({i},{j})", 8)


def buffers(axes: Axes) -> None:
    blank(axes, "the memory: one tensor a level, [N, H, W, channels]", 9, 6)
    for level in range(4):
        height, y = 1.0 / 1.5**level, (4.5, 2.6, 1.35, 0.35)[level]
        axes.text(0.1, y + height / 2, f"level {level}", fontsize=8, va="center", color=INK)
        for column in range(4 - level):
            box(axes, 1.2 + 1.7 * column, y, 1.7, height, colour_of(level, column), f"X({level},{column})", 8)
    axes.annotate("", (1.2, 5.75), (4.6, 5.75), arrowprops={"arrowstyle": "<->", "color": INK})
    axes.text(2.9, 5.82, "prefix: leading channels, nothing copied", fontsize=8, ha="center", va="bottom", color=INK)
    arrow(axes, (4.3, 5.0), (5.0, 5.0))
    arrow(axes, (3.9, 3.27), (5.3, 4.48), -0.15)
    axes.text(5.15, 3.75, "low source: read at half the resolution,\nby phases", fontsize=8, va="center", color=INK)


def level_buffers() -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(7, 9))
    nodes(axes[0])
    buffers(axes[1])
    return figure


def phase(axes: Axes, row: int, column: int) -> None:
    """Output pixel (2u + row, 2v + column) over a map up-sampled twofold, and its composed weights."""
    blank(axes, f"phase ({row},{column})", 10.6, 6.2)
    for y in range(6):
        for x in range(6):
            low = y // 2, x // 2
            colour = LOW_PIXELS[(low[0] % 2) * 2 + low[1] % 2]
            axes.add_patch(Rectangle((x, 5 - y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
            if y % 2 == 0 and x % 2 == 0:
                axes.add_patch(Rectangle((x, 4 - y), 2, 2, fill=False, edgecolor="#888888", linewidth=0.8))
    centre = 2 + row, 2 + column
    axes.add_patch(Rectangle((centre[1] - 1, 4 - centre[0]), 3, 3, fill=False, edgecolor=INK, linewidth=2.2))
    taps: dict[tuple[int, int], list[str]] = {}
    for a in range(3):
        for b in range(3):
            y, x = centre[0] + a - 1, centre[1] + b - 1
            axes.text(x + 0.5, 5.5 - y, f"w{a}{b}", ha="center", va="center", fontsize=7, color=INK)
            taps.setdefault((y // 2, x // 2), []).append(f"w{a}{b}")
    arrow(axes, (6.1, 3), (6.9, 3))
    least = min(taps)
    for (y, x), names in taps.items():
        lines = "\n".join(
            " + ".join(names[k : k + 2]) + (" +" if k + 2 < len(names) else "") for k in range(0, len(names), 2)
        )
        box(axes, 7 + 1.8 * (x - least[1]), 3.0 - 1.8 * (y - least[0]), 1.8, 1.8,
            LOW_PIXELS[(y % 2) * 2 + x % 2], lines, 6)  # fmt: skip


def phases() -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4))
    for row in range(2):
        for column in range(2):
            phase(axes[row][column], row, column)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"level-buffers": level_buffers, "phases": phases}


def main() -> None:
    OUT.mkdir(exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "unetpp_fast", "font.family": "DejaVu Sans"})
    for name, draw in FIGURES.items():
        figure = draw()
        figure.tight_layout()
        figure.savefig(
            OUT / f"{name}.svg", metadata={"Date": None, "Description": f"docs/draw.py {HASH}"}, facecolor="white"
        )
        plt.close(figure)


if __name__ == "__main__":
    main()
