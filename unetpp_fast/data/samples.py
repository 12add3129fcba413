"""Images with masks, and their split into training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.progress import progress_bar
from ..models.normalisation import Normalisation
from .images import STANDARD
from .inputs import Drawn, read_drawn_mask, read_inputs, spacing_of, stack_masks
from .resampling import at_spacing, checked_spacing, common_spacing


@dataclass(frozen=True)
class Sample:
    """An image or volume and its masks, one file per class; read when needed. channels: further files of the image.
    resampled_to: the spacing of volumes after reading, in mm along each axis of `*S`; None for that of the file."""

    name: str
    image: Path
    masks: tuple[Path, ...]
    channels: tuple[Path, ...] = field(default=(), kw_only=True)
    normalisation: Normalisation | None = field(default=STANDARD, kw_only=True)
    resampled_to: tuple[float, ...] | None = field(default=None, kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, *S]`, and mask, bool `[classes, *S]`.

        Raises:
            InputError: a file cannot be read, or the sizes or grids differ.
        """
        masks = [self._drawn(path) for path in self.masks]
        image = self.normalisation(read_inputs((self.image, *self.channels), masks[0]))
        return at_spacing(image, stack_masks(masks), self.file_spacing, self.resampled_to, self.image)

    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres between voxels along each axis of `*S`, if the files are volumes that tell."""
        return self.resampled_to or self.file_spacing()

    def file_spacing(self) -> tuple[float, ...] | None:
        """As `spacing`, before volumes are resampled."""
        return spacing_of(self.masks[0], self.image)

    def values(self) -> np.ndarray:
        """The image before it is normalised, float64 `[C, *S]`; errors as `load`."""
        return read_inputs((self.image, *self.channels), self._drawn(self.masks[0]))

    def _drawn(self, path: Path) -> Drawn:
        return read_drawn_mask(path).on_grid_of(self.image)


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


def dataset_normalisation(samples: Sequence[Sample | ArraySample]) -> Normalisation:
    """Mean and standard deviation of each channel over all pixels of all samples, which are read once: of those that train.

    Raises:
        InputError: the samples are of a task that prepares images in a way of its own, or as `Normalisation.of_dataset`.
    """
    _check_free(samples)
    return Normalisation.of_dataset(sample.values() for sample in progress_bar(samples, desc="statistics", disable=None))


def class_pixels(samples: Sequence[Any]) -> list[int]:
    """The pixels or voxels of each class in all masks, which are read once."""
    masks = (sample.load()[1] for sample in progress_bar(samples, desc="counting classes", disable=None))
    return sum((mask > 0).reshape(len(mask), -1).sum(axis=1) for mask in masks).tolist()


def with_normalisation(samples: Sequence[Any], normalisation: Normalisation) -> list[Any]:
    """These samples, prepared by it; `Trainer` then notes it in the network. Errors as `dataset_normalisation`."""
    _check_free(samples)
    return [replace(sample, normalisation=normalisation) for sample in samples]


def with_spacing(samples: Sequence[Any], wanted: Sequence[float]) -> list[Any]:
    """These samples of volumes, resampled to a spacing when they are read; `Trainer` then notes it in the network.

    wanted: in mm, one number for each axis of `*S`.

    Raises:
        InputError: a volume does not tell the size of its voxels.
    """
    for sample in samples:
        _file_spacing(sample, len(wanted))
    return [replace(sample, resampled_to=tuple(map(float, wanted))) for sample in samples]


def dataset_spacing(samples: Sequence[Any]) -> tuple[float, ...]:
    """The spacing that suits these samples of volumes (`resampling.common_spacing`). Errors as `with_spacing`."""
    return common_spacing([_file_spacing(sample, 3) for sample in samples])


def _file_spacing(sample: Any, axes: int) -> Sequence[float]:
    found = sample.file_spacing() if hasattr(sample, "file_spacing") else None
    return checked_spacing(found, axes, sample.name if isinstance(sample, ArraySample) else sample.image)


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
