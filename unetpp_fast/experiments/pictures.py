"""Overlays, the paper's qualitative comparison (Fig. 2) and speed against accuracy (Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic_files import write_atomic
from ..common.extras import need
from ..data.label_maps import voc_palette

COLOURS = np.array([[255, 80, 60], [60, 170, 255], [80, 220, 100], [250, 200, 40], [200, 100, 250]], np.float32)
HEAT = np.array([255, 225, 40], np.float32)
AGREE, MISSED, EXTRA = "#e8e8e8", "#3c8cff", "#ff5a3c"


def class_colours(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 `[K, 3]`: how exclusive classes are drawn over an image, without the background: as in the palette, or as in
    `COLOURS` if it is VOC's, whose first ones, dark red and dark green, are hard to see and to tell apart."""
    count = len(palette) - 1
    plain = count <= len(COLOURS) and np.array_equal(palette, voc_palette(count + 1))
    return COLOURS[:count] if plain else np.array(palette[1:], np.float32)


def stretch(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` from `[C, H, W]`, C = 1 or 3, between its 0.5 and 99.5 percentiles."""
    low, high = np.percentile(image, (0.5, 99.5))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.broadcast_to(scaled.astype(np.uint8).transpose(1, 2, 0), (*image.shape[1:], 3))


def overlay(image: np.ndarray, masks: np.ndarray, colours: np.ndarray = COLOURS) -> np.ndarray:
    """uint8 `[H, W, 3]`: the image `[C, H, W]` with the masks `[classes, H, W]` tinted and outlined."""
    picture = stretch(image).astype(np.float32)
    for index, mask in enumerate(masks.astype(bool)):
        colour = colours[index % len(colours)]
        picture[mask] = 0.7 * picture[mask] + 0.3 * colour
        picture[mask & ~_eroded(mask)] = colour
    return picture.astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]`: the image `[C, H, W]` in dark grey, and `HEAT` where the values `[H, W]`, from 0, are largest."""
    grey = 0.6 * stretch(image).astype(np.float32).mean(axis=2, keepdims=True)
    share = values[..., None] / max(float(values.max(initial=0)), 1e-6)
    return (grey * (1 - share) + HEAT * share).astype(np.uint8)


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(np.pad(mask, 1), shift, axis=axis)[1:-1, 1:-1]
    return inner


def _figure(columns: int, width: float, height: float, rows: int = 1):
    figure_module = need("matplotlib.figure", "demo")  # needs no display, unlike pyplot
    figure = figure_module.Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: Path) -> None:
    # Without date and version, so that equal pictures are equal files.
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=120, metadata={"Software": None}))


def qualitative(
    path: Path, image: np.ndarray, truth: np.ndarray, predictions: Mapping[str, tuple[np.ndarray, float]]
) -> None:
    """The paper's Fig. 2: image `[C, H, W]`, truth `[H, W]`, and the mask and IoU of each model.

    In a prediction, true positives are light, false negatives blue and false positives red.
    """
    height, width = truth.shape
    count = 2 + len(predictions)
    figure, (axes,) = _figure(count, 2.6 * count, 2.6 * height / width + 0.4)
    _fill(axes, stretch(image), truth, [mask for mask, _ in predictions.values()])
    _finish(figure, axes, predictions, path)


def planes(
    path: Path,
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, tuple[np.ndarray, float]],
    shown: Sequence[int],
) -> None:
    """As `qualitative`, with a row for each plane in `shown` of a volume; image and masks are `[D, H, W]`."""
    depth, height, width = truth.shape
    count = 2 + len(predictions)
    figure, grid = _figure(count, 2.6 * count, len(shown) * (2.6 * height / width + 0.1) + 0.4, len(shown))
    grey = stretch(image.reshape(1, depth * height, width)).reshape(depth, height, width, 3)  # one contrast for all
    for axes, plane in zip(grid, shown, strict=True):
        _fill(axes, grey[plane], truth[plane], [mask[plane] for mask, _ in predictions.values()])
        axes[0].text(1, 1, f"plane {plane}", color="white", fontsize=8, verticalalignment="top")
    _finish(figure, grid[0], predictions, path)


def _fill(axes: Sequence[Any], image: np.ndarray, truth: np.ndarray, masks: Sequence[np.ndarray]) -> None:
    """Draws an image `[H, W, 3]`, its truth and the predicted masks side by side."""
    axes[0].imshow(image)
    axes[1].imshow(truth, cmap="gray", vmin=0, vmax=1)
    colours = [tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) for value in (AGREE, MISSED, EXTRA)]
    for axis, mask in zip(axes[2:], masks, strict=True):
        picture = np.zeros((*truth.shape, 3), np.uint8)
        for colour, where in zip(colours, (truth & mask, truth & ~mask, mask & ~truth), strict=True):
            picture[where] = colour
        axis.imshow(picture, interpolation="nearest")
    for axis in axes:
        axis.axis("off")


def _finish(figure: Any, axes: Sequence[Any], predictions: Mapping[str, tuple[np.ndarray, float]], path: Path) -> None:
    """Writes the titles above `axes` and saves the figure."""
    titles = ["image", "truth", *(f"{name}, IoU {iou:.3f}" for name, (_, iou) in predictions.items())]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    figure.supxlabel("predictions: light = correct, blue = missed, red = false positive", fontsize=9)
    _save(figure, path)


def speed_accuracy(path: Path, rows: Sequence[Mapping], title: str) -> None:
    """The paper's Fig. 3: IoU against time per image, one point per row with keys name, ms, iou, parameters."""
    figure, ((axis,),) = _figure(1, 6.0, 4.0)
    nested = [row for row in rows if row["name"].startswith("UNet++")]
    axis.plot([row["ms"] for row in nested], [row["iou"] for row in nested], color="#9aa5b1", linewidth=1, zorder=1)
    for row in rows:
        colour = "#d9483b" if row in nested else "#3b6fd9"
        axis.scatter(row["ms"], row["iou"], s=20 + row["parameters"] / 1e4, color=colour, alpha=0.85, zorder=2)
        axis.annotate(
            f"{row['name']}\n{row['parameters'] / 1e6:.2f} M", (row["ms"], row["iou"]), xytext=(8, -14),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axis.margins(x=0.25, y=0.18)
    axis.set_xlabel("ms per image (median); area: parameters")
    axis.set_ylabel("IoU on the held-out part")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    _save(figure, path)
