"""Images with masks, and their split into training and validation.

The layout of a folder is that of pytorch-nested-unet::

    images/<id>.png        grey or colour, 8 or 16 bit
    masks/<class>/<id>.png one file per class and image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.progress import progress_bar
from ..models.normalisation import Normalisation
from .file_formats import find_images
from .images import STANDARD, check_size, read_normalised, read_values
from .masks import read_mask


@dataclass(frozen=True)
class Sample:
    """An image and its masks, one file per class; read when needed."""

    name: str
    image: Path
    masks: tuple[Path, ...]
    normalisation: Normalisation | None = field(default=STANDARD, kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, H, W]`, and mask, bool `[classes, H, W]`.

        Raises:
            InputError: a file cannot be read, or the sizes differ.
        """
        image = read_normalised(self.image, self.normalisation)
        masks = []
        for path in self.masks:
            mask = read_mask(path)
            check_size(path, mask, self.image, image)
            masks.append(mask)
        return image, np.stack(masks)

    def values(self) -> np.ndarray:
        """The image before it is normalised, float64 `[C, H, W]`; errors as `load`."""
        return read_values(self.image)


@dataclass(frozen=True)
class ArraySample:
    """Like `Sample`, from arrays in memory: image float32 `[C, *S]`, not yet normalised, and mask `[classes, *S]`."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    normalisation: Normalisation = field(default=STANDARD, kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image and mask."""
        return self.normalisation(self.image), self.mask

    def values(self) -> np.ndarray:
        """The image before it is normalised."""
        return self.image


Dataset = tuple[list, list[str]]  # samples and the names of their classes


def find_samples(root: Path) -> Dataset:
    """Every image under `root` with its masks, sorted by id, and the names of the classes.

    Raises:
        InputError: a folder is missing or empty, or an image has no mask.
    """
    pictures, folder = root / "images", root / "masks"
    if not pictures.is_dir():
        raise InputError(f"{pictures} is not a folder: expected {pictures}/<id>.png and {folder}/<class>/<id>.png")
    images = find_images(pictures)
    inside = folder.iterdir() if folder.is_dir() else []
    classes = sorted(path.name for path in inside if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folder of masks: expected {folder}/<class>/<id>.png, e.g. {folder}/0/")
    masks = {name: find_images(folder / name) for name in classes}
    for name in classes:
        missing = sorted(set(images) - set(masks[name]))
        if missing:
            first = images[missing[0]]
            raise InputError(f"image {first} has no mask {folder / name / missing[0]}.png ({len(missing)} such image(s))")
    samples = [Sample(key, path, tuple(masks[name][key] for name in classes)) for key, path in images.items()]
    return samples, classes


def dataset_normalisation(samples: Sequence[Sample | ArraySample]) -> Normalisation:
    """Mean and standard deviation of each channel over all pixels of all samples, which are read once: of those that train.

    Raises:
        InputError: the samples are of a task that prepares images in a way of its own, or as `Normalisation.of_dataset`.
    """
    _check_free(samples)
    return Normalisation.of_dataset(sample.values() for sample in progress_bar(samples, desc="statistics", disable=None))


def with_normalisation(samples: Sequence[Any], normalisation: Normalisation) -> list[Any]:
    """These samples, prepared by it; `Trainer` then notes it in the network. Errors as `dataset_normalisation`."""
    _check_free(samples)
    return [replace(sample, normalisation=normalisation) for sample in samples]


def _check_free(samples: Sequence[Any]) -> None:
    own = next((sample for sample in samples if getattr(sample, "values", None) is None), None)
    if own is not None:
        raise InputError(f"{own.name} is prepared as its task prescribes: leave the normalisation out")


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples: groups are chosen at random by `seed`, at least one for each side.

    Samples with the same `group` (a patient, a video) stay on one side; a sample without one is a group by itself.

    Args:
        samples: in any order, which does not matter.
        fraction: share of the groups used for validation, between 0 and 1.
        seed: of the choice.

    Raises:
        InputError: there are fewer than two groups, or the fraction is out of range.
    """
    names = groups(samples)
    if len(names) < 2:
        same = f": all {len(samples)} are from {names[0]}" if len(samples) > 1 else ""
        raise InputError(f"training needs at least 2 images, one for validation, from two patients or videos{same}")
    if not 0.0 < fraction < 1.0:
        raise InputError(f"the validation fraction must lie between 0 and 1, not {fraction}")
    order = np.random.default_rng(seed).permutation(len(names))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    chosen = {names[index] for index in order[:count]}
    ordered = sorted(samples, key=lambda sample: sample.name)
    train = [sample for sample in ordered if _group(sample) not in chosen]
    return train, [sample for sample in ordered if _group(sample) in chosen]


def groups(samples: Sequence[Sample]) -> list[str]:
    """The distinct groups of the samples, sorted."""
    return sorted({_group(sample) for sample in samples})


def _group(sample: Sample) -> str:
    return getattr(sample, "group", sample.name)


def check_samples(samples: Sequence[Sample]) -> int:
    """Reads every sample once and returns the number of channels of the images.

    Raises:
        InputError: an image or mask cannot be used, grey and colour images are mixed, or all masks are empty (a single
            empty mask is fine: that image is all background).
    """
    channels: dict[int, str] = {}
    foreground = False
    for sample in progress_bar(samples, desc="checking", unit="image", disable=None, leave=False):
        image, mask = sample.load()
        channels.setdefault(image.shape[0], str(sample.image))
        foreground = foreground or bool(mask.any())
    if not foreground:
        raise InputError(f"all {len(samples)} masks are empty, that of {samples[0].image} first: there is nothing to learn")
    if len(channels) > 1:
        (first, one), (second, other) = list(channels.items())[:2]
        raise InputError(f"{one} has {first} channel(s) but {other} has {second}: convert all images to one kind")
    return next(iter(channels))
