"""Images with masks, and their split into training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from ..common.extras import need
from .images import standardise
from .inputs import read_drawn_mask, read_inputs, stack_masks


@dataclass(frozen=True)
class Sample:
    """An image or volume and its masks, one file per class; read when needed. channels: further files of the image."""

    name: str
    image: Path
    masks: tuple[Path, ...]
    channels: tuple[Path, ...] = field(default=(), kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image, float32 `[C, *S]`, and mask, bool `[classes, *S]`.

        Raises:
            InputError: a file cannot be read, or the sizes or grids differ.
        """
        masks = [read_drawn_mask(path) for path in self.masks]
        return standardise(read_inputs((self.image, *self.channels), masks[0])), stack_masks(masks)


@dataclass(frozen=True)
class ArraySample:
    """Like `Sample`, from arrays in memory: image float32 `[C, *S]`, not yet standardised, and mask `[classes, *S]`."""

    name: str
    image: np.ndarray
    mask: np.ndarray

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image and mask."""
        return standardise(self.image), self.mask


Dataset = tuple[list, list[str]]  # samples and the names of their classes


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
