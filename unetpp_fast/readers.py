"""Pictures as their providers ship them: the nuclei of the 2018 Data Science Bowl and frames of colonoscopies.

A reader takes the folder that holds the data set and gives its samples and its classes, or None where it does not see
its layout. What is there but damaged is one `InputError` that names the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from . import data
from .data import Sample
from .files import InputError, read_image, read_mask

Found = tuple[list, list[str]]  # samples and classes

STAGES = ("", "stage1_train")
# Names that collections of colonoscopy frames give to the folder of frames and the one of masks.
FRAMES = (("Original", "Ground Truth"), ("images", "masks"), ("frames", "GT"))
FRAME_SIZE = 224


@dataclass(frozen=True)
class InstanceSample(Sample):
    """An image with one mask file an object; together they are the mask of its single class."""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image, float32 `[C, H, W]`, and mask, bool `[1, H, W]`; errors as `Sample.load`."""
        image = read_image(self.image)
        united = np.zeros(image.shape[1:], bool)
        for path in self.masks:
            mask = read_mask(path)
            data.check_size(path, mask, self.image, image)
            united |= mask
        return data.standardise(image), united[None]


def nuclei_folders(root: Path) -> Found | None:
    """`images/<id>.png` with `masks/<class>/<id>.png`, the layout of pytorch-nested-unet."""
    return data.find_samples(root) if (root / "images").is_dir() else None


def nuclei_stage1(root: Path) -> Found | None:
    """`stage1_train/<id>/images/<id>.png` with `stage1_train/<id>/masks/*.png`, one file a nucleus; the root may be
    `stage1_train` itself."""
    for stage in STAGES:
        folders = sorted(path for path in (root / stage).glob("*") if (path / "images").is_dir())
        if folders:
            return [_instances(folder) for folder in folders], ["nuclei"]
    return None


def _instances(folder: Path) -> InstanceSample:
    images = data.find_images(folder / "images")
    if len(images) > 1:
        raise InputError(f"{folder / 'images'} holds {len(images)} images, expected one: keep {folder.name}.png")
    if not (folder / "masks").is_dir():
        raise InputError(f"{folder} has no folder masks/: is it of the test set? Only stage1_train has masks")
    masks = data.find_images(folder / "masks")
    return InstanceSample(folder.name, next(iter(images.values())), tuple(masks.values()))


@dataclass(frozen=True)
class FrameSample(Sample):
    """A frame of a video, scaled to 224x224 pixels, as the recorders differ in size."""

    group: str = ""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image, float32 `[3, 224, 224]`, and mask, bool `[1, 224, 224]`.

        Raises:
            InputError: a file cannot be read, the sizes differ, or the frame has no colours.
        """
        image, mask = read_image(self.image), read_mask(self.masks[0])
        data.check_size(self.masks[0], mask, self.image, image)
        if len(image) != 3:
            raise InputError(f"{self.image} is grey: frames of colonoscopies have 3 channels, convert or remove it")
        size = (FRAME_SIZE, FRAME_SIZE)
        return data.standardise(scaled(image, size)), scaled(mask[None].astype(np.float32), size) > 0.5


def scaled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 `[C, H, W]` at another size: interpolated, or what a pixel covers averaged."""
    return F.interpolate(torch.from_numpy(values)[None], size, mode="bilinear", antialias=True)[0].numpy()


def polyp_frames(root: Path) -> Found | None:
    """A folder of frames beside one of masks with the same file names (`FRAMES`), in the root or in a folder a video.

    Frames of one video stay together when the data are split; of frames that lie in the root each counts alone.
    """
    samples: list[FrameSample] = []
    for folder in [root, *sorted(path for path in root.glob("*") if path.is_dir())]:
        pair = next(((folder / a, folder / b) for a, b in FRAMES if (folder / a).is_dir()), None)
        if pair:
            samples += _frames(*pair, video="" if folder == root else folder.name)
    return (samples, ["polyp"]) if samples else None


def _frames(frames: Path, masks: Path, video: str) -> Sequence[FrameSample]:
    images, truths = data.find_images(frames), data.find_images(masks)
    lacking = sorted(set(images) - set(truths))
    if lacking:
        raise InputError(f"frame {images[lacking[0]]} has no mask in {masks} ({len(lacking)} such frame(s))")
    prefix = f"{video}/" if video else ""
    return [FrameSample(prefix + key, path, (truths[key],), video or key) for key, path in images.items()]
