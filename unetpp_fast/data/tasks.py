"""The four tasks of the paper (Zhou et al., 2018, table 1): what their data look like, and where to get them.

Nothing is downloaded. `TASKS["liver"].read(folder)` gives samples for `Patches` and `Trainer`, after checking the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from . import samples
from .readers import lidc, liver, nodule_crops, nuclei, polyp
from .samples import check_samples, find_samples

Reader = Callable[[Path], samples.Found | None]


@dataclass(frozen=True)
class Task:
    """A task of the paper.

    Args:
        spatial_dims: 2 or 3.
        patch: side of what the network sees in training, in pixels or voxels.
        per_image: patches drawn from each sample an epoch.
        source: the data set's name and where its provider gives it.
        layouts: each a description and the reader of it, tried in this order.
        prepare: how `load` prepares values, which prediction has to repeat: `{"window": (low, high)}` in Hounsfield units
            (`data.rescale`) or `{"size": side}` in pixels; empty: each image standardised.
        channels: of the images, where the readers fix it and checked the files' headers; None: every file is read once.
    """

    name: str
    spatial_dims: int
    patch: int
    per_image: int
    source: str
    layouts: tuple[tuple[str, Reader], ...]
    prepare: dict[str, Any] = field(default_factory=dict)
    channels: int | None = None

    def read(self, root: Path) -> tuple[list, list[str], int]:
        """The samples of a folder, the names of their classes, and the channels of the images.

        Raises:
            InputError: the folder does not exist, has none of the layouts, or a file in it is damaged; one line says what
                was expected and where to get it, or names the file.
        """
        for _, reader in self.layouts:
            found = reader(root)
            if found:
                samples, classes = found
                return samples, classes, self.channels or check_samples(samples)
        what = f"holds no data of the task {self.name!r}" if root.is_dir() else "is no folder"
        wanted = " or ".join(layout for layout, _ in self.layouts)
        raise InputError(f"{root} {what}: expected {wanted}; get it from {self.source}")


_NUCLEI = Task(
    "nuclei", 2, 96, 4,
    "the 2018 Data Science Bowl (BBBC038), https://bbbc.broadinstitute.org/BBBC038",
    (
        ("images/<id>.png with masks/<class>/<id>.png", nuclei.nuclei_folders),
        ("stage1_train/<id>/images/<id>.png with stage1_train/<id>/masks/*.png", nuclei.nuclei_stage1),
    ),
)  # fmt: skip
_POLYP = Task(
    "polyp", 2, polyp.FRAME_SIZE, 1,
    "ASU-Mayo (on request) or CVC-ClinicDB, https://polyp.grand-challenge.org",
    (("frames and masks in Original/ and Ground Truth/, or so in a folder for each video", polyp.polyp_frames),),
    {"size": polyp.FRAME_SIZE},
)  # fmt: skip
_LIVER = Task(
    "liver", 2, 512, 1,
    "the LiTS challenge, https://competitions.codalab.org/competitions/17094",
    (("volume-N.nii with segmentation-N.nii, in any folder below", liver.liver_volumes),),
    {"window": liver.LIVER_WINDOW}, 1,
)  # fmt: skip
_NODULE = Task(
    "nodule", 3, lidc.CROP, 1,
    "LIDC-IDRI at The Cancer Imaging Archive, https://www.cancerimagingarchive.net/collection/lidc-idri",
    (
        ("images/<id>.nii.gz with masks/<class>/<id>.nii.gz (or .nii, or .npy)", nodule_crops.crop_folders),
        ("the DICOM series and the XML annotations of LIDC-IDRI", lidc.lidc_series),
    ),
    {"window": nodule_crops.LUNG_WINDOW},
)  # fmt: skip
FOLDER = replace(_NUCLEI, name="folder", layouts=(("", find_samples),))  # the user's own; always read or refused
TASKS = {task.name: task for task in (_NUCLEI, _POLYP, _LIVER, _NODULE)}
