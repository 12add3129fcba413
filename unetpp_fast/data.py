"""Images with masks in folders, and the random patches that training draws from them.

The layout is the one of pytorch-nested-unet, which many people have::

    images/<id>.png        grey or colour, 8 or 16 bit
    masks/<class>/<id>.png one file a class and image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import InputError, need, read_image, read_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
CACHE_BYTES = 2**31


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


def check_size(mask_path: Path, mask: np.ndarray, image_path: Path, image: np.ndarray) -> None:
    """Raises InputError unless the mask `[*S]` has the size of the image `[C, *S]`."""
    if mask.shape != image.shape[1:]:
        have, want = _size(mask.shape), _size(image.shape[1:])
        raise InputError(f"mask {mask_path} is {have} but its image {image_path} is {want}: they must be of one size")


def standardise(image: np.ndarray) -> np.ndarray:
    """Each channel of `[C, *S]` to mean 0 and standard deviation 1 over its pixels; a constant one to 0."""
    axes = tuple(range(1, image.ndim))
    mean = image.mean(axis=axes, keepdims=True, dtype=np.float64)
    std = image.std(axis=axes, keepdims=True, dtype=np.float64)
    return ((image - mean) / np.maximum(std, 1e-6)).astype(np.float32)


def rescale(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values (Hounsfield units, for CT) from `window` to -1..1 as float32, those outside it clipped.

    Unlike `standardise` it is the same for a slice, a crop and a whole volume.
    """
    low, high = window
    return ((np.clip(image, low, high) - low) * (2 / (high - low)) - 1).astype(np.float32)


def find_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Image files of a folder by id (the name without its ending), sorted.

    Raises:
        InputError: there is no such folder, it holds no image, or two files share an id.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in suffixes if path.name.lower().endswith(ending)), None)
        if ending and not path.name.startswith("."):
            name = path.name[: -len(ending)]
            if name in found:
                raise InputError(f"{found[name]} and {path} have one id: keep one of them")
            found[name] = path
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(suffixes)})")
    return found


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


class Patches(torch.utils.data.Dataset):
    """Random square or cubic patches with flips and, within the last two axes, 90-degree turns.

    A patch is a function of (seed, epoch, draw) alone, so an interrupted training draws the same ones when it goes on,
    with any number of workers. Images smaller than the patch are padded by repeating their border.

    Args:
        samples: images with masks.
        patch: side in pixels, along every axis.
        per_image: draws from each image an epoch.
        seed: of every random choice.
        augment: flips and turns.
    """

    def __init__(self, samples: Sequence[Sample | ArraySample], patch: int, per_image: int, seed: int, augment: bool = True):
        self.samples, self.patch, self.per_image, self.seed, self.augment = samples, patch, per_image, seed, augment
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Draws an epoch."""
        return len(self.samples) * self.per_image

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `index`, kept in memory up to 2 GiB over all samples."""
        if index in self._cache:
            return self._cache[index]
        image, mask = self.samples[index].load()
        if self._cached_bytes + image.nbytes + mask.nbytes <= CACHE_BYTES:
            self._cache[index] = image, mask
            self._cached_bytes += image.nbytes + mask.nbytes
        return image, mask

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image float32 `[C, patch, ...]` and mask float32 `[classes, patch, ...]` of (epoch, draw)."""
        epoch, draw = item
        random = np.random.default_rng((self.seed, epoch, draw))
        image, mask = (self._enlarge(values) for values in self.load(draw % len(self.samples)))
        starts = [int(random.integers(size - self.patch + 1)) for size in image.shape[1:]]
        window = (slice(None), *(slice(start, start + self.patch) for start in starts))
        image, mask = image[window], mask[window]
        if self.augment:
            turns, flip = int(random.integers(4)), bool(random.integers(2))
            image, mask = (np.rot90(values, turns, axes=(-2, -1)) for values in (image, mask))
            if flip:
                image, mask = image[..., ::-1], mask[..., ::-1]
            if image.ndim == 4 and random.integers(2):
                image, mask = image[:, ::-1], mask[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(mask, np.float32))

    def _enlarge(self, values: np.ndarray) -> np.ndarray:
        missing = [max(0, self.patch - size) for size in values.shape[1:]]
        if not any(missing):
            return values
        return np.pad(values, [(0, 0)] + [(amount // 2, amount - amount // 2) for amount in missing], mode="edge")

    def batches(self, epoch: int, batch_size: int, start: int = 0) -> list[list[tuple[int, int]]]:
        """The items of each batch of an epoch in its shuffled order, from batch `start` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self)).tolist()
        every = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        return [[(epoch, draw) for draw in batch] for batch in every[start:]]


def load_batches(patches: Patches, batches: list, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as tensors `[N, C, *S]` and `[N, classes, *S]`, read ahead by `workers` processes.

    Raises:
        InputError: an image cannot be used, or a process that reads died.
    """
    generator = torch.Generator()  # of its own: the loader would draw from the global one, which dropout uses
    loader = torch.utils.data.DataLoader(
        patches, batch_sampler=batches, num_workers=workers, pin_memory=pin, generator=generator
    )
    try:
        yield from loader
    except InputError as error:  # a process that reads adds where it came from, over many lines
        raise InputError(str(error).strip().split("InputError: ")[-1]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = str(error).strip().split("\n")[0]
        raise InputError(f"a process that reads images ahead died ({what}): use fewer --workers, or 0") from error


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


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
