"""The four tasks of the paper (Zhou et al., 2018, table 1): the layouts of their data, and where to get them.

Nothing is downloaded. `TASKS["liver"].read(folder)` checks the folder and returns samples for `Patches` and `Trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .readers.lidc import CROP, lidc_series
from .readers.liver import LIVER_WINDOW, liver_volumes
from .readers.nodule_crops import LUNG_WINDOW, crop_folders
from .readers.nuclei import nuclei_folders, nuclei_stage1
from .readers.polyp import FRAME_SIZE, polyp_frames
from .samples import Dataset, check_samples

Reader = Callable[[Path], Dataset | None]  # None: the folder has another layout


@dataclass(frozen=True)
class Task:
    """A task of the paper.

    Args:
        name: for `--task`.
        spatial_dims: 2 or 3.
        patch: side of a training patch, in pixels or voxels.
        per_image: patches drawn from each sample per epoch.
        source: the data set's name and where to get it.
        layouts: (description, reader) pairs, tried in this order.
        prepare: how `load` prepares values, which prediction repeats: `{"window": (low, high)}` in Hounsfield units
            (`images.rescale`) or `{"size": side}` in pixels; if empty, each image is standardised.
        channels: of the images, if the readers know it from checking the headers; None: every file is read once.
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
        """The samples in a folder, the names of their classes, and the number of channels of the images.

        Raises:
            InputError: the folder does not exist, has none of the layouts, or holds a damaged file; one line says what was
                expected and where to get it, or names the file.
        """
        for _, reader in self.layouts:
            dataset = reader(root)
            if dataset:
                samples, classes = dataset
                return samples, classes, self.channels or check_samples(samples)
        what = f"holds no data of the task {self.name!r}" if root.is_dir() else "is not a folder"
        expected = " or ".join(layout for layout, _ in self.layouts)
        raise InputError(f"{root} {what}: expected {expected}; get it from {self.source}")


_NUCLEI = Task(
    "nuclei", 2, 96, 4,
    "the 2018 Data Science Bowl (BBBC038), https://bbbc.broadinstitute.org/BBBC038",
    (
        ("images/<id>.png with masks/<class>/<id>.png", nuclei_folders),
        ("stage1_train/<id>/images/<id>.png with stage1_train/<id>/masks/*.png", nuclei_stage1),
    ),
)  # fmt: skip
_POLYP = Task(
    "polyp", 2, FRAME_SIZE, 1,
    "ASU-Mayo (on request) or CVC-ClinicDB, https://polyp.grand-challenge.org",
    (("frames and masks in Original/ and Ground Truth/, or such a pair in one folder per video", polyp_frames),),
    {"size": FRAME_SIZE},
)  # fmt: skip
_LIVER = Task(
    "liver", 2, 512, 1,
    "the LiTS challenge, https://competitions.codalab.org/competitions/17094",
    (("volume-N.nii with segmentation-N.nii, in any folder below", liver_volumes),),
    {"window": LIVER_WINDOW}, 1,
)  # fmt: skip
_NODULE = Task(
    "nodule", 3, CROP, 1,
    "LIDC-IDRI at The Cancer Imaging Archive, https://www.cancerimagingarchive.net/collection/lidc-idri",
    (
        ("images/<id>.nii.gz with masks/<class>/<id>.nii.gz (or .nii, or .npy)", crop_folders),
        ("the DICOM series and the XML annotations of LIDC-IDRI", lidc_series),
    ),
    {"window": LUNG_WINDOW},
)  # fmt: skip
PATCH = {2: 96, 3: 64}  # side of the patches of the user's own images, and of their volumes


def own_folder(spatial_dims: int) -> Task:
    """What stands for a task where the data are the user's own (`layouts.read_folder`)."""
    return Task("folder", spatial_dims, PATCH[spatial_dims], _NUCLEI.per_image, "", ())


TASKS = {task.name: task for task in (_NUCLEI, _POLYP, _LIVER, _NODULE)}
