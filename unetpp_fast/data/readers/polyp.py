"""ASU-Mayo and CVC-ClinicDB: frames of colonoscopy videos with masks of polyps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ..file_formats import find_images
from ..images import check_size, read_image, scaled, standardise
from ..masks import read_mask
from ..samples import Dataset, Sample

# The names that collections of colonoscopy frames give to the folders of frames and masks.
FRAMES = (("Original", "Ground Truth"), ("images", "masks"), ("frames", "GT"))
FRAME_SIZE = 224


@dataclass(frozen=True)
class FrameSample(Sample):
    """A video frame, scaled to 224x224 pixels because frame sizes differ between recorders."""

    group: str = ""
    normalisation: None = field(default=None, kw_only=True)  # scaling is more than that

    values = None  # prepared as the task prescribes

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Standardised image, float32 `[3, 224, 224]`, and mask, bool `[1, 224, 224]`.

        Raises:
            InputError: a file cannot be read, the sizes differ, or the frame is grey.
        """
        image, mask = read_image(self.image), read_mask(self.masks[0])
        check_size(self.masks[0], mask, self.image, image)
        if len(image) != 3:
            raise InputError(f"{self.image} is grey: colonoscopy frames have 3 channels, convert or remove it")
        size = (FRAME_SIZE, FRAME_SIZE)
        return standardise(scaled(image, size)), scaled(mask[None].astype(np.float32), size) > 0.5


def polyp_frames(root: Path) -> Dataset | None:
    """A folder of frames next to a folder of masks with the same file names (`FRAMES`), in the root or one pair per video.

    Frames of one video stay together when the data are split; frames in the root are split one by one.
    """
    samples: list[FrameSample] = []
    for folder in [root, *sorted(path for path in root.glob("*") if path.is_dir())]:
        pair = next(((folder / a, folder / b) for a, b in FRAMES if (folder / a).is_dir()), None)
        if pair:
            samples += _frames(*pair, video="" if folder == root else folder.name)
    return (samples, ["polyp"]) if samples else None


def _frames(frames: Path, masks: Path, video: str) -> Sequence[FrameSample]:
    images, masks_by_id = find_images(frames), find_images(masks)
    missing = sorted(set(images) - set(masks_by_id))
    if missing:
        raise InputError(f"frame {images[missing[0]]} has no mask in {masks} ({len(missing)} such frame(s))")
    prefix = f"{video}/" if video else ""
    return [FrameSample(prefix + key, path, (masks_by_id[key],), video or key) for key, path in images.items()]
