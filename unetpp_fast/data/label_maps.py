"""Images and volumes with label maps: one file each, whose pixels hold the number of their class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from ..common.progress import progress_bar
from ..models.normalisation import Normalisation
from .images import STANDARD
from .inputs import read_drawn_labels, read_inputs, spacing_of
from .resampling import at_spacing

IGNORED = 255  # as in VOC and Cityscapes
MOST = 254
COUNTED = 2**22  # pixels at a time


@dataclass(frozen=True)
class LabelSample:
    """An image or volume and its label map; read when needed. channels, resampled_to: as of `Sample`."""

    name: str
    image: Path
    labels: Path
    classes: int
    ignore: int | None
    channels: tuple[Path, ...] = field(default=(), kw_only=True)
    normalisation: Normalisation = field(default=STANDARD, kw_only=True)
    resampled_to: tuple[float, ...] | None = field(default=None, kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, *S]`, and one-hot labels, bool `[classes, *S]`; ignored pixels have no class.

        Raises:
            InputError: a file cannot be read, the sizes or grids differ, or a label is none of the classes.
        """
        drawn = read_drawn_labels(self.labels).on_grid_of(self.image)
        image, labels = self.normalisation(read_inputs((self.image, *self.channels), drawn)), drawn.values
        one_hot = labels == np.arange(self.classes, dtype=labels.dtype).reshape(-1, *[1] * labels.ndim)
        stray = labels[~one_hot.any(axis=0) & (labels != (-1 if self.ignore is None else self.ignore))]
        if stray.size:
            raise InputError(f"label map {self.labels} holds {stray[0]}: the classes are 0 to {self.classes - 1}")
        return at_spacing(image, one_hot, self.file_spacing, self.resampled_to, self.image, exclusive=True)

    def spacing(self) -> tuple[float, ...] | None:
        """As `Sample.spacing`."""
        return self.resampled_to or self.file_spacing()

    def file_spacing(self) -> tuple[float, ...] | None:
        """As `Sample.file_spacing`."""
        return spacing_of(self.labels, self.image)

    def values(self) -> np.ndarray:
        """The image before it is normalised, float64 `[C, *S]`."""
        return read_inputs((self.image, *self.channels), read_drawn_labels(self.labels).on_grid_of(self.image))


@dataclass(frozen=True)
class RegionSample(LabelSample):
    """An image and a label map of which several values together are a class, so that classes overlap. regions: the values of
    each class."""

    regions: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, *S]`, and masks, bool `[classes, *S]`; errors as `LabelSample.load`."""
        drawn = read_drawn_labels(self.labels).on_grid_of(self.image)
        image = self.normalisation(read_inputs((self.image, *self.channels), drawn))
        masks = np.stack([np.isin(drawn.values, values) for values in self.regions])
        return at_spacing(image, masks, self.file_spacing, self.resampled_to, self.image)


@dataclass(frozen=True)
class Seen:
    """What the label maps of a folder hold.

    values: all values, sorted. palette: of the first file that has one, `[entries, 3]`. together: whether some file holds 1
    and 255. spatial_dims: 2 for images, 3 for volumes.
    """

    values: tuple[int, ...]
    palette: np.ndarray | None
    together: bool
    spatial_dims: int


def survey(files: Sequence[Path]) -> Seen:
    """Reads all label maps once.

    Raises:
        InputError: as `read_drawn_labels`, or some are images and others volumes.
    """
    values: dict[int, Path] = {}
    dims: dict[int, Path] = {}
    palette, together = None, False
    for path in progress_bar(files, desc="reading labels", unit="file", disable=None):
        drawn = read_drawn_labels(path)
        found = _values_in(drawn.values)
        palette = drawn.palette if palette is None else palette
        together = together or {1, IGNORED} <= set(found)
        values |= {value: values.get(value, path) for value in found}
        dims.setdefault(drawn.values.ndim, path)
    if len(dims) > 1:
        raise InputError(f"{dims[2]} is an image but {dims[3]} is a volume: train on one kind at a time")
    return Seen(tuple(sorted(values)), palette, together, next(iter(dims), 2))


def _values_in(labels: np.ndarray) -> list[int]:
    """The values of a label map; of bytes by counting them, since sorting a large volume takes seconds."""
    if labels.dtype != np.uint8:
        return np.unique(labels).tolist()
    parts = np.array_split(labels.ravel(), 1 + labels.size // COUNTED)
    return np.flatnonzero(np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)).tolist()


def is_binary(seen: Seen) -> bool:
    """Whether the files are masks of one class: 0 and 1, or 0 and 255, and no palette."""
    binary = set(seen.values) <= {0, 1} or set(seen.values) <= {0, IGNORED}
    return binary and seen.palette is None


def label_classes(seen: Seen, folder: Path, names: Sequence[str] | None, ignore: int | None) -> list[str]:
    """The names of the classes: those given, or background, 1, 2, ... up to the largest value.

    Args:
        seen: of the folder.
        folder: for messages.
        names: of all classes, that of 0 first; None to count them.
        ignore: the value of pixels that are left out.

    Raises:
        InputError: values are missing or left over; the message lists them.
    """
    values = [value for value in seen.values if value != ignore]
    shown = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
    if names is None and ignore == IGNORED and set(seen.values) == {0, 1, IGNORED} and not seen.together:
        raise InputError(f"{folder} mixes masks of 0 and 1 with masks of 0 and 255: save all in one way")
    count = len(names) if names else len(values)
    if count < 2 or count > MOST:
        raise InputError(f"{folder} holds label maps with the values {shown}: expected 2 to {MOST} classes")
    strays = [value for value in values if value >= count]
    if strays or (names is None and values != list(range(count))):
        wanted = f"0 to {count - 1}" if names else "0, 1, 2, ... without a gap"
        hint = "name all of them with --classes, or --ignore-index a value that is none"
        raise InputError(f"{folder} holds label maps with the values {shown}, expected {wanted}: {hint}")
    return list(names) if names else ["background", *map(str, range(1, count))]


def check_regions(seen: Seen, folder: Path, regions: Mapping[str, Sequence[int]]) -> None:
    """Raises InputError if the label maps of a folder hold a value of no region; masks know no ignored pixels."""
    known = {0} | {value for values in regions.values() for value in values}
    strays = [value for value in seen.values if value not in known]
    if strays:
        raise InputError(
            f"{folder} holds label maps with the value {strays[0]}, which is in none of the regions {dict(regions)}"
        )


def voc_palette(count: int) -> np.ndarray:
    """The colours of PASCAL VOC, uint8 `[count, 3]`: black, then the bits of the number spread over the channels."""
    numbers = np.arange(count)
    channels = [sum(((numbers >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def palette_of(seen: Seen, count: int) -> list[list[int]]:
    """The colours of `count` classes: of the files' palette as far as it goes, else of `voc_palette`."""
    colours = voc_palette(count)
    if seen.palette is not None:
        known = min(count, len(seen.palette))
        colours[:known] = seen.palette[:known]
    return colours.tolist()
