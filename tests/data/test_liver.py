"""LiTS as distributed: every slice is a sample, and a volume stays on one side of the split."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from support.medical_files import disc, write_liver, write_nifti

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.readers.liver import LIVER_WINDOW
from unetpp_fast.data.samples import groups, split
from unetpp_fast.data.tasks import TASKS

LIVER = TASKS["liver"]


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_every_slice_is_a_sample_in_hounsfield_units(tmp_path, ending):
    samples, classes, channels = LIVER.read(write_liver(tmp_path / "Training Batch 1", ending=ending).parent)
    assert len(samples) == 3 * 4 and classes == ["liver"] and channels == 1
    assert samples[6].name == "volume-001/0002" and groups(samples) == ["volume-000", "volume-001", "volume-002"]
    image, mask = samples[6].load()
    volume = nibabel.load(tmp_path / "Training Batch 1" / f"volume-1.{ending}").get_fdata()[..., 2].T
    assert image.shape == mask.shape == (1, 32, 40) and image.dtype == np.float32
    low, high = LIVER_WINDOW
    assert np.allclose(image[0], (np.clip(volume, low, high) - low) / (high - low) * 2 - 1, atol=1e-6)
    assert np.array_equal(mask[0], disc(40, 32, (20, 16), 8).T)  # the lesion is liver too
    assert not samples[0].load()[1].any()  # only background


def test_a_volume_stays_on_one_side_of_the_split(tmp_path):
    samples, _, _ = LIVER.read(write_liver(tmp_path))
    for seed in range(3):
        train, validation = split(samples, 0.2, seed)
        assert len(train) == 8 and len(validation) == 4 and len(groups(validation)) == 1
    with pytest.raises(InputError, match="from two patients or videos: all 4 are from volume-000"):
        split(samples[:4], 0.2, 0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "segmentation-1.nii").unlink(), r"volume-1\.nii has no segmentation-1\.nii"),
        (lambda root: write_nifti(root / "more/volume-1.nii", np.zeros((4, 4, 4))), r"volume-1\.nii have the same number"),
    ],
    ids=["no_mask", "double"],
)
def test_missing_and_repeated_files_are_named(tmp_path, damage, says):
    damage(write_liver(tmp_path))
    with pytest.raises(InputError, match=says):
        LIVER.read(tmp_path)
