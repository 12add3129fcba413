"""Random patches for training, drawn from images and put into batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError, first_line
from .augmentation import Augmentation
from .geometry import sides_of
from .samples import ArraySample, Sample

CACHE_BYTES = 2**31
PLACES = 1000  # pixels of each class of an image from which one is chosen, spread evenly
TRANSFORM_STREAM = 1  # the random numbers of transforms are not those of the place of a patch
SECONDS_TO_NOTICE = 5.0  # at most, between the death of a worker process and the signal


class Patches(torch.utils.data.Dataset):
    """Random patches with flips and, within the last two axes, 90-degree rotations (by 180 degrees if these axes have unlike
    sides), and further changes.

    A patch depends only on (seed, epoch, draw), so a resumed training draws the same patches, with any number of workers.
    Images smaller than the patch are padded by repeating their border.

    Args:
        samples: images with masks.
        patch: side in pixels, of every axis or one per axis.
        per_image: draws from each image per epoch.
        seed: of all random choices.
        augment: whether to flip and rotate.
        transform: further random changes, before these.
        foreground: share of the patches that hold a pixel of a class chosen at random from those of the image, 0 to 1.
        background: the class that does not count as foreground; None if all do (masks).
        outside: the class of pixels that a transform brings in from outside of the image; None: they have none.
        cache: bytes of samples, and of where their foreground is, that are kept in memory; the workers of a `BatchLoader`
            share it out evenly. What does not fit is read for every patch again.

    Raises:
        InputError: a share or the cache is out of range.
    """

    def __init__(
        self, samples: Sequence[Sample | ArraySample], patch: int | Sequence[int], per_image: int, seed: int,
        augment: bool = True, transform: Augmentation | None = None, foreground: float = 0.0,
        background: int | None = None, outside: int | None = None, cache: int = CACHE_BYTES,
    ):  # fmt: skip
        if not 0.0 <= foreground <= 1.0:
            raise InputError(f"the share of patches with foreground must be between 0 and 1, not {foreground}")
        if cache < 0:
            raise InputError(f"the memory to keep images in must be at least 0 bytes, not {cache}")
        self.samples, self.patch, self.per_image, self.seed, self.augment = samples, patch, per_image, seed, augment
        self.transform, self.foreground, self.background, self.outside = transform, foreground, background, outside
        self._places: dict[int, list[np.ndarray]] = {}
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.cache, self._kept = cache, 0

    def __len__(self) -> int:
        """Draws per epoch."""
        return len(self.samples) * self.per_image

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `index`, from the cache if it is there."""
        if index in self._cache:
            return self._cache[index]
        image, mask = self.samples[index].load()
        if self._has_room(image, mask):
            self._cache[index] = image, mask
        return image, mask

    def _has_room(self, *arrays: np.ndarray) -> bool:
        """Whether the cache of this process has room for these, which then count as kept."""
        worker, count = torch.utils.data.get_worker_info(), sum(values.nbytes for values in arrays)
        room = self._kept + count <= self.cache // (worker.num_workers if worker else 1)
        self._kept += count if room else 0
        return room

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image float32 `[C, *patch]` and mask float32 `[classes, *patch]` for (epoch, draw)."""
        epoch, draw = item
        random = np.random.default_rng((self.seed, epoch, draw))
        index = draw % len(self.samples)
        image, mask = (self._enlarge(values) for values in self.load(index))
        sides = sides_of(self.patch, image.ndim - 1)
        starts = [int(random.integers(size - side + 1)) for size, side in zip(image.shape[1:], sides, strict=True)]
        if self.foreground and random.random() < self.foreground:
            starts = self._starts_of_foreground(index, mask, random) or starts
        if self.transform:
            image, mask = (self._around(values, starts, self.transform.margin) for values in (image, mask))
            image, mask = self.transform(image, mask, (self.seed, epoch, draw, TRANSFORM_STREAM))
            if self.outside is not None:
                mask[self.outside] |= ~mask.any(axis=0)
        else:
            image, mask = (self._around(values, starts, 0) for values in (image, mask))
        if self.augment:
            turns, flip = int(random.integers(4)), bool(random.integers(2))
            turns -= turns % 2 if sides[-1] != sides[-2] else 0
            image, mask = (np.rot90(values, turns, axes=(-2, -1)) for values in (image, mask))
            if flip:
                image, mask = image[..., ::-1], mask[..., ::-1]
            if image.ndim == 4 and random.integers(2):
                image, mask = image[:, ::-1], mask[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(mask, np.float32))

    def _around(self, values: np.ndarray, starts: list[int], margin: int) -> np.ndarray:
        """The patch that begins at `starts`, with a margin on each side that is zero outside of the image."""
        inner, missing = [], []
        for start, size, side in zip(starts, values.shape[1:], sides_of(self.patch, len(starts)), strict=True):
            first, last = start - margin, start + side + margin
            inner.append(slice(max(first, 0), min(last, size)))
            missing.append((max(-first, 0), max(last - size, 0)))
        part = values[(slice(None), *inner)]
        return np.pad(part, [(0, 0), *missing]) if any(map(any, missing)) else part

    def _starts_of_foreground(self, index: int, mask: np.ndarray, random: np.random.Generator) -> list[int]:
        """Where a patch begins that holds a pixel of a class of this sample; [] if it has no foreground."""
        places = self._places.get(index)
        if places is None:
            classes = [np.flatnonzero(values) for number, values in enumerate(mask) if number != self.background]
            chosen = [found[np.linspace(0, len(found) - 1, PLACES).astype(int)] for found in classes if len(found)]
            places = [np.unique(found) for found in chosen]
            if self._has_room(*places):
                self._places[index] = places
        if not places:
            return []
        found = places[random.integers(len(places))]
        pixel = np.unravel_index(found[random.integers(len(found))], mask.shape[1:])
        sides = sides_of(self.patch, len(pixel))
        lowest = [max(0, int(at) - side + 1) for at, side in zip(pixel, sides, strict=True)]
        highest = [min(int(at), size - side) for at, size, side in zip(pixel, mask.shape[1:], sides, strict=True)]
        return [int(random.integers(low, high + 1)) for low, high in zip(lowest, highest, strict=True)]

    def _enlarge(self, values: np.ndarray) -> np.ndarray:
        sides = sides_of(self.patch, values.ndim - 1)
        missing = [max(0, side - size) for size, side in zip(values.shape[1:], sides, strict=True)]
        if not any(missing):
            return values
        return np.pad(values, [(0, 0)] + [(amount // 2, amount - amount // 2) for amount in missing], mode="edge")

    def batches(self, epoch: int, batch_size: int, start: int = 0) -> list[list[tuple[int, int]]]:
        """The (epoch, draw) items of each batch of an epoch, shuffled, from batch `start` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self)).tolist()
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        return [[(epoch, draw) for draw in batch] for batch in batches[start:]]


class BatchLoader:
    """Reads batches of patches, ahead by worker processes, which stay with their cached images from epoch to epoch.

    Args:
        patches: what the batches are drawn from.
        workers: number of processes; 0 reads in this one.
        pin: whether the tensors are in page-locked memory.
    """

    def __init__(self, patches: Patches, workers: int, pin: bool):
        self.patches, self.workers, self.pin = patches, workers, pin
        self._batches: list = []
        self._loader: torch.utils.data.DataLoader | None = None

    def __iter__(self) -> Iterator[list]:
        """The batches of the running epoch, for the loader."""
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def load(self, batches: list) -> Iterator[tuple[Tensor, Tensor]]:
        """These batches, from `patches.batches`, as tensors `[N, C, *S]` and `[N, classes, *S]`.

        Raises:
            InputError: an image cannot be used, or a worker process died.
        """
        self._batches = batches
        if self._loader is None:
            generator = torch.Generator()  # otherwise the loader would draw from the global generator, which dropout uses
            self._loader = torch.utils.data.DataLoader(
                self.patches, batch_sampler=self, num_workers=self.workers, pin_memory=self.pin, generator=generator,
                persistent_workers=self.workers > 0,
            )  # fmt: skip
        finished = False
        try:
            try:
                yield from self._loader
                finished = True
            except (ConnectionError, EOFError):  # sockets of a dying process close before the loader notices its death
                time.sleep(SECONDS_TO_NOTICE)  # the loader's signal handler raises RuntimeError during the sleep
                raise
        except InputError as error:  # a worker process puts its traceback before the message
            raise InputError(str(error).strip().split("InputError: ")[-1]) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that reads images ahead died ({first_line(error)}): use fewer --workers, or 0"
            ) from error
        finally:
            if not finished:  # what the workers still hold belongs to no later epoch
                self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        self._loader = None
