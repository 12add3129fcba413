"""Frames of colonoscopies (ASU-Mayo, CVC-ClinicDB)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ..images import check_size, find_images, read_image, read_mask, scaled, standardise
from ..samples import Found, Sample

# Names that collections of colonoscopy frames give to the folder of frames and the one of masks.
FRAMES = (("Original", "Ground Truth"), ("images", "masks"), ("frames", "GT"))
FRAME_SIZE = 224


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
        check_size(self.masks[0], mask, self.image, image)
        if len(image) != 3:
            raise InputError(f"{self.image} is grey: frames of colonoscopies have 3 channels, convert or remove it")
        size = (FRAME_SIZE, FRAME_SIZE)
        return standardise(scaled(image, size)), scaled(mask[None].astype(np.float32), size) > 0.5


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
    images, truths = find_images(frames), find_images(masks)
    lacking = sorted(set(images) - set(truths))
    if lacking:
        raise InputError(f"frame {images[lacking[0]]} has no mask in {masks} ({len(lacking)} such frame(s))")
    prefix = f"{video}/" if video else ""
    return [FrameSample(prefix + key, path, (truths[key],), video or key) for key, path in images.items()]
