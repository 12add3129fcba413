"""Images with masks in folders, and the random patches that training draws from them.

The layout is the one of pytorch-nested-unet, which many people have::

    images/<id>.png        grey or colour, 8 or 16 bit
    masks/<class>/<id>.png one file a class and image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from ..common.extras import need
from .images import check_size, find_images, read_image, read_mask, standardise


@dataclass(frozen=True)
class Sample:
    """One image and its masks, one file a class; read when asked for."""

    name: str
    image: Path
    masks: tuple[Path, ...]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image, float32 `[C, H, W]`, and mask, bool `[classes, H, W]`.

        Raises:
            InputError: a file cannot be read, or the sizes differ.
        """
        image = read_image(self.image)
        masks = []
        for path in self.masks:
            mask = read_mask(path)
            check_size(path, mask, self.image, image)
            masks.append(mask)
        return standardise(image), np.stack(masks)


@dataclass(frozen=True)
class ArraySample:
    """As `Sample`, from arrays in memory: image float32 `[C, H, W]`, not standardised yet, mask `[classes, H, W]`."""

    name: str
    image: np.ndarray
    mask: np.ndarray

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return standardise(self.image), self.mask


def find_samples(root: Path) -> tuple[list[Sample], list[str]]:
    """Every image under `root` with its masks, sorted by id, and the names of the classes.

    Raises:
        InputError: a folder is missing or empty, or an image lacks a mask.
    """
    pictures, folder = root / "images", root / "masks"
    if not pictures.is_dir():
        raise InputError(f"{pictures} is no folder: expected {pictures}/<id>.png and {folder}/<class>/<id>.png")
    images = find_images(pictures)
    inside = folder.iterdir() if folder.is_dir() else []
    classes = sorted(path.name for path in inside if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folder of masks: expected {folder}/<class>/<id>.png, e.g. {folder}/0/")
    masks = {name: find_images(folder / name) for name in classes}
    for name in classes:
        lacking = sorted(set(images) - set(masks[name]))
        if lacking:
            first = images[lacking[0]]
            raise InputError(f"image {first} has no mask {folder / name / lacking[0]}.png ({len(lacking)} such image(s))")
    samples = [Sample(key, path, tuple(masks[name][key] for name in classes)) for key, path in images.items()]
    return samples, classes


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples: a seeded choice from the sorted groups, each side at least one.

    Samples with one `group` (a patient, a video) stay on one side; those without are groups of their own.
    """
    names = groups(samples)
    if len(names) < 2:
        alike = f": all {len(samples)} are of {names[0]}" if len(samples) > 1 else ""
        raise InputError(f"training needs at least 2 images, one of them for validation, of two patients or videos{alike}")
    if not 0.0 < fraction < 1.0:
        raise InputError(f"the validation fraction must lie between 0 and 1, not {fraction}")
    order = np.random.default_rng(seed).permutation(len(names))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    chosen = {names[index] for index in order[:count]}
    ordered = sorted(samples, key=lambda sample: sample.name)
    train = [sample for sample in ordered if _group(sample) not in chosen]
    return train, [sample for sample in ordered if _group(sample) in chosen]


def groups(samples: Sequence[Sample]) -> list[str]:
    """The groups of the samples, each once, sorted."""
    return sorted({_group(sample) for sample in samples})


def _group(sample: Sample) -> str:
    return getattr(sample, "group", sample.name)


def check_samples(samples: Sequence[Sample]) -> int:
    """Channels of the images, after looking at each of them once.

    Raises:
        InputError: an image or mask cannot be used, grey and colour images are mixed, or every mask is empty (one may
            be: it says that all is background).
    """
    channels: dict[int, str] = {}
    foreground = False
    for sample in need("tqdm", "commands").tqdm(samples, desc="checking", unit="image", disable=None, leave=False):
        image, mask = sample.load()
        channels.setdefault(image.shape[0], str(sample.image))
        foreground = foreground or bool(mask.any())
    if not foreground:
        raise InputError(f"all {len(samples)} masks are empty, that of {samples[0].image} first: there is nothing to learn")
    if len(channels) > 1:
        (first, one), (second, other) = list(channels.items())[:2]
        raise InputError(f"{one} has {first} channel(s) but {other} has {second}: convert all images to one kind")
    return next(iter(channels))


Found = tuple[list, list[str]]  # samples and classes
