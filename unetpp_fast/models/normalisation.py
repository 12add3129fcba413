"""How the values of images are prepared for a network: as in its training. A network carries it in its config.

Whole numbers say what they are: values as a camera or a file stores them. So every entry point prepares them by the
network's `Normalisation`. Floating-point values are taken as they are: nobody can tell what was done to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError

CHUNK_BYTES = 2**22
SMALLEST_STD = 1e-6  # a constant channel becomes 0
UNITS = {"uint8": 1 / 255, "uint16": 1 / 65535}  # as pictures are read (`data.decoding`)
KINDS = {"image": (), "dataset": ("mean", "std"), "window": ("window",)}
Prepare = Callable[[np.ndarray], np.ndarray]  # real values `[C, *part]` of an image to float32


@dataclass(frozen=True)
class Normalisation:
    """How images are prepared.

    Args:
        kind: "image": each channel of each image to mean 0 and standard deviation 1 over its pixels. "dataset":
            (value - mean) / std. "window": clipped to a window and mapped to -1..1, as Hounsfield units are.
        mean, std: of "dataset", one number per channel, for 8-bit values divided by 255 and unsigned 16-bit ones by 65535;
            other values as they are.
        window: of "window", lowest and highest value, in the image's own units.

    Raises:
        InputError: a ValueError; the numbers do not fit the kind.
    """

    kind: str = "image"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    window: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"a normalisation is one of {', '.join(KINDS)}, not {self.kind!r}")
        for name in ("mean", "std", "window"):
            try:
                numbers = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError):
                raise InputError(f"{name} of a normalisation must be numbers, not {getattr(self, name)!r}") from None
            object.__setattr__(self, name, numbers)
            if bool(numbers) != (name in KINDS[self.kind]) or not all(map(math.isfinite, numbers)):
                raise InputError(f"a normalisation of kind {self.kind!r} has {name} {numbers}: {self._expected()}")
        wrong = len(self.mean) != len(self.std) or any(value <= 0 for value in self.std)
        if wrong or (self.window and (len(self.window) != 2 or self.window[0] >= self.window[1])):
            raise InputError(f"{self} does not fit: {self._expected()}")

    def _expected(self) -> str:
        if self.kind == "image":
            return "expected no numbers"
        return "expected low < high" if self.kind == "window" else "expected a mean and a positive std for each channel"

    @property
    def in_words(self) -> str:
        """What is done to the values of an image."""
        if self.kind == "window":
            return f"clipped to {self.window[0]:g} to {self.window[1]:g} and mapped to -1 to 1"
        if self.kind == "image":
            return "each channel of each image with mean 0 and standard deviation 1"
        units = "after 8-bit values were divided by 255 and unsigned 16-bit ones by 65535"
        return f"less the mean {list(self.mean)}, divided by {list(self.std)}, channel by channel, {units}"

    @property
    def config(self) -> dict[str, Any]:
        """Plain data for `from_config`."""
        return {"kind": self.kind, **{name: list(getattr(self, name)) for name in KINDS[self.kind]}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Normalisation | None:
        """The normalisation of a `config`; None for None. Errors as the constructor."""
        if config is None:
            return None
        if not isinstance(config, Mapping) or set(config) - {"kind", "mean", "std", "window"}:
            raise InputError(f"{config!r} is no normalisation")
        return cls(**config)

    @classmethod
    def of_dataset(cls, images: Iterable[np.ndarray]) -> Normalisation:
        """Mean and standard deviation of each channel over all pixels of all images, real values `[C, *S]`, each read once.

        Raises:
            InputError: there is no image, channels differ in number, or one is constant.
        """
        count, mean, squares = 0, np.zeros(0), np.zeros(0)
        for image in images:
            values = np.asarray(image, np.float64).reshape(len(image), -1)
            if count and len(values) != len(mean):
                raise InputError(f"images of {len(mean)} and of {len(values)} channels have no common mean")
            if not count:
                mean = squares = np.zeros(len(values))
            own, both = values.mean(axis=1), count + values.shape[1]
            off, share = own - mean, values.shape[1] / both  # by parts, as in Chan, Golub and LeVeque, 1979
            squares = squares + ((values - own[:, None]) ** 2).sum(axis=1) + off**2 * count * share
            mean, count = mean + off * share, both
        std = np.sqrt(squares / max(count, 1))
        if not count or not (std > 0).all():
            raise InputError("the data set has no statistics: " + ("a channel is constant" if count else "it has no images"))
        return cls("dataset", tuple(mean.tolist()), tuple(std.tolist()))

    def fitted(self, chunks: Callable[[], Iterable[np.ndarray]]) -> Prepare:
        """What prepares any part of an image.

        chunks: gives the image piece by piece, real values `[C, *piece]`, float64; called twice if statistics are needed.
        """
        if self.kind == "window":
            return lambda values: rescale(values, self.window)
        if self.kind == "dataset":
            return lambda values: _shifted(values, *(_columns(numbers, values) for numbers in (self.mean, self.std)))
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for chunk in chunks():
            axes = tuple(range(1, chunk.ndim))
            count, total = count + chunk[0].size, total + chunk.sum(axis=axes, keepdims=True)
        mean = total / count
        for chunk in chunks():
            squares = squares + ((chunk - mean) ** 2).sum(axis=tuple(range(1, chunk.ndim)), keepdims=True)
        std = np.sqrt(squares / count)
        return lambda values: _shifted(values, mean, std)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """An image of real values `[C, *S]`, float32 `[C, *S]`.

        Raises:
            InputError: it has other channels.
        """
        self.check_channels(len(image))
        return standardise(image) if self.kind == "image" else self.fitted(lambda: [])(image)

    def check_channels(self, channels: int) -> None:
        """Raises InputError if the numbers are for other images than those of so many channels."""
        if self.mean and len(self.mean) != channels:
            raise InputError(f"{self} is for {len(self.mean)} channel(s), the image has {channels}")

    def unit(self, dtype: np.dtype) -> float:
        """By what whole numbers are multiplied before `fitted` and `__call__` see them."""
        return 1.0 if self.kind == "window" else UNITS.get(dtype.name, 1.0)


def standardise(image: np.ndarray) -> np.ndarray:
    """Scales each channel of `[C, *S]` to mean 0 and standard deviation 1 over its pixels; a constant channel to 0."""
    axes = tuple(range(1, image.ndim))
    mean = image.mean(axis=axes, keepdims=True, dtype=np.float64)
    return _shifted(image, mean, image.std(axis=axes, keepdims=True, dtype=np.float64))


def rescale(image: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Clips values (Hounsfield units, for CT) to `window` and maps it to -1..1, as float32.

    Unlike `standardise`, the result is the same for a slice, a crop and a whole volume.
    """
    low, high = window
    return ((np.clip(image, low, high) - low) * (2 / (high - low)) - 1).astype(np.float32)


def _shifted(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return ((values - mean) / np.maximum(std, SMALLEST_STD)).astype(np.float32)


def _columns(numbers: Sequence[float], values: np.ndarray) -> np.ndarray:
    """One number per channel, to be broadcast over `[C, *S]`."""
    return np.reshape(numbers, (-1, *[1] * (values.ndim - 1)))


class NormalisedImages:
    """Whole numbers `[N, C, *S]`, of any kind that slices, prepared slice by slice; statistics are taken by bands."""

    def __init__(self, images: Any, normalisation: Normalisation):
        self.images, self.normalisation, self.shape = images, normalisation, tuple(images.shape)
        self._index: int | slice = -1
        self._prepare: Prepare | None = None
        normalisation.check_channels(self.shape[1])

    def __getitem__(self, where: tuple[int | slice, ...]) -> np.ndarray:
        """float32 `[C, *tile]` at (image, slice, ...)."""
        if self._prepare is None or where[0] != self._index:
            self._index = where[0]
            self._prepare = self.normalisation.fitted(lambda: (self._real(band) for band in self.bands(where[0])))
        return self._prepare(self._real(where))

    def bands(self, index: int | slice) -> Iterator[tuple[int | slice, ...]]:
        """The places of bands of an image that take some megabytes in float64."""
        _, channels, height, *rest = self.shape
        rows = max(1, CHUNK_BYTES // (8 * channels * math.prod(rest)))
        everything = [slice(None)] * len(rest)
        for first in range(0, height, rows):
            yield (index, slice(None), slice(first, min(first + rows, height)), *everything)

    def _real(self, where: tuple[int | slice, ...]) -> np.ndarray:
        part = self.images[where]
        values = part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
        return values.astype(np.float64) * self.normalisation.unit(values.dtype)


def prepared(network: Any, images: Any) -> Any:
    """`images` as the network takes them: whole numbers as `NormalisedImages`, others as they are.

    Raises:
        TypeError: they are whole numbers, and the network does not know how it was trained.
        InputError: they have other channels than those whose statistics the network carries.
    """
    if not _whole(images):
        return images
    normalisation = getattr(network, "normalisation", None)
    if normalisation is None:
        raise TypeError(
            f"the image holds whole numbers ({images.dtype}), and this network carries no normalisation: give"
            " floating-point values prepared as in its training, or set network.normalisation = uf.Normalisation(...)"
        )
    return NormalisedImages(images, normalisation)


def prepared_tensor(network: Any, x: Any) -> Any:
    """As `prepared`, for a tensor `[N, C, *S]` that is wanted as a whole, in the network's precision and where `x` is."""
    if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[1] != network.topology.in_channels or not _whole(x):
        return x  # of another shape: refused with the right words where it is checked
    images = prepared(network, x)
    values = torch.empty(x.shape)
    for index in range(x.shape[0] if x.numel() else 0):
        for band in images.bands(index):
            values[band] = torch.from_numpy(images[band])
    return values.to(x.device, next(network.parameters()).dtype)


def _whole(images: Any) -> bool:
    """Whether an array or tensor holds whole numbers or truth values."""
    if isinstance(images, Tensor):
        return not images.is_floating_point() and not images.is_complex()
    dtype = getattr(images, "dtype", None)
    try:
        return dtype is not None and np.dtype(dtype).kind in "biu"
    except TypeError:  # a type of another library
        return False
