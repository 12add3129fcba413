"""Images on which a network did worst and best, with what it should have found and what it found."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.samples import ArraySample, Sample
from ..experiments.pictures import COLOURS, class_colours, overlay, stretch
from ..models.architectures import AnyNetwork
from ..models.prediction import mean_probabilities
from ..training.evaluation import MEMORY, logits
from .page import LONGEST

CORRECT, MISSED, EXTRA, OTHER = ((232, 232, 232), (60, 140, 255), (255, 90, 60), (250, 200, 40))


class Looked(NamedTuple):
    """How an image was predicted: its index in the samples, IoU over its classes, and IoU of each class (NaN: absent)."""

    index: int  # type: ignore[assignment]
    iou: float
    classes: list[float]


def look(
    network: AnyNetwork, samples: Sequence[Sample | ArraySample], dtype: str, exclusive: bool, seconds: float
) -> list[Looked]:
    """Predicts images, evenly chosen from `samples`, until all are done or the time is over."""
    began, found = time.monotonic(), []
    for index in _spread(len(samples)):
        image, truth = samples[index].load()
        masks = predicted(network, image, dtype, exclusive)
        wanted = truth.astype(bool)
        axes = tuple(range(1, wanted.ndim))
        counted = wanted.any(axis=0) if exclusive else np.ones(wanted.shape[1:], bool)
        both, either = ((masks & wanted & counted).sum(axes), ((masks | wanted) & counted).sum(axes))
        scores = [float(a / b) if b else (float("nan") if exclusive else 1.0) for a, b in zip(both, either, strict=True)]
        present = [score for score in scores if score == score]
        found.append(Looked(index, sum(present) / len(present) if present else 1.0, scores))
        if time.monotonic() - began > seconds:
            break
    return found


def _spread(count: int) -> list[int]:
    """The indices of `count` samples, such that any first part of the list is spread over all of them."""
    bits = max(1, (count - 1).bit_length())
    turned = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits))
    return [index for index in turned if index < count]


def predicted(network: AnyNetwork, image: np.ndarray, dtype: str, exclusive: bool) -> np.ndarray:
    """Masks, bool `[classes, *S]`, of a standardised image `[C, *S]`."""
    with torch.no_grad():
        outputs = logits(network, image, dtype, MEMORY)  # in tiles, if the validation took some
        values = mean_probabilities(outputs, "softmax" if exclusive else "sigmoid")[0].float().cpu()
    if not exclusive:
        return (values > 0.5).numpy()
    return (values.argmax(dim=0) == torch.arange(len(values)).view(-1, *[1] * (values.ndim - 1))).numpy()


def panels(network: AnyNetwork, sample: Sample | ArraySample, about: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """The image, its truth, the prediction and where they differ, uint8 `[H, W, 3]` each; of a volume one plane.

    Args:
        about: of the checkpoint: whether classes exclude one another, and their colours.
    """
    exclusive = bool(about.get("exclusive"))
    image, truth = sample.load()
    truth, found = truth.astype(bool), predicted(network, image, dtype, exclusive)
    if truth.ndim == 4:  # the plane with most of the foreground
        plane = int(np.argmax(truth[int(exclusive) :].sum(axis=(0, 2, 3))))
        image, truth, found = image[:, plane], truth[:, plane], found[:, plane]
    step = max(1, max(truth.shape[1:]) // (2 * LONGEST))  # what the page shows is smaller still
    image, truth, found = (values[:, ::step, ::step] for values in (image, truth, found))
    image = image[:3] if len(image) >= 3 else image[:1]
    colours = tints(about)
    if exclusive:
        counted = np.any(truth, axis=0)
        differs = _differences(truth.argmax(axis=0), np.where(counted, found.argmax(axis=0), 0), counted)
        truth, found = truth[1:], found[1:]
    else:
        differs = _differences(np.any(truth, axis=0), np.any(found, axis=0), None)
        wrong = (truth & ~found).any(axis=0) & (found & ~truth).any(axis=0)
        differs[wrong] = OTHER
    return {
        "image": stretch(image),
        "truth": overlay(image, truth, colours),
        "prediction": overlay(image, found, colours),
        "differences": differs,
    }


def tints(about: Mapping[str, Any]) -> np.ndarray:
    """The colours of the classes, float32 `[K, 3]`, without that of exclusive classes' background."""
    palette = about.get("palette") if about.get("exclusive") else None
    return class_colours(palette) if palette else COLOURS


def _differences(truth: np.ndarray, found: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """Labels (0 is background) that agree are light, missed ones blue, false ones red, exchanged ones yellow."""
    picture = np.zeros((*truth.shape, 3), np.uint8)
    there, said = truth > 0, found > 0
    for colour, where in (
        (CORRECT, there & (truth == found)),
        (MISSED, there & ~said),
        (EXTRA, said & ~there),
        (OTHER, there & said & (truth != found)),
    ):
        picture[where & counted if counted is not None else where] = colour
    return picture


def hexadecimal(colour: Sequence[float]) -> str:
    """A colour of three bytes in CSS."""
    return "#" + "".join(f"{int(value):02x}" for value in colour)
