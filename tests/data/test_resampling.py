"""Volumes of unlike spacing: a sphere keeps its mm³, and what is resampled comes back onto its grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.medical_files import write_itk, write_nifti
from support.resident import peak_of
from torch.nn import functional as F

from unetpp_fast.common.errors import InputError
from unetpp_fast.data import resampling
from unetpp_fast.data.geometry import spacing_from
from unetpp_fast.data.label_maps import LabelSample
from unetpp_fast.data.samples import ArraySample, Sample, dataset_spacing, with_spacing

RADIUS = 14.0  # mm
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.8), (1.3, 2.1, 0.9)]


def sphere(spacing: tuple[float, ...], side: float = 48.0, at: float = 24.3) -> np.ndarray:
    """A ball of `RADIUS` in a cube of `side` mm, bool `[z, y, x]`; a voxel belongs to it by its centre."""
    axes = [(np.arange(round(side / size)) + 0.5) * size - at for size in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return z**2 + y**2 + x**2 < RADIUS**2


def write(path, values: np.ndarray, spacing: tuple[float, ...]):
    """Writes `[z, y, x]` with these voxels."""
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = (-30.5, 12.0, 7.25)
    return write_nifti(path, values.T, affine) if path.name.endswith(".nii.gz") else write_itk(path, values, affine)


@pytest.mark.parametrize("size", [(9, 20, 13), (4, 5, 31), (1, 12, 12), (7, 12, 15)])
def test_images_are_resampled_as_by_torch_in_one_piece(size):
    volume = np.random.default_rng(0).normal(size=(1, 2, 7, 12, 15)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(volume), size, mode="trilinear")[0].numpy()
    np.testing.assert_allclose(resampling.resampled(volume, size), wanted, atol=1e-6)
    mask = volume[0] > 0
    share = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None], size, mode="trilinear")[0].numpy()
    sure = np.abs(share - 0.5) > 1e-3
    assert np.array_equal(resampling.resampled_mask(mask, size, False)[sure], (share > 0.5)[sure]) and sure.mean() > 0.7
    exclusive = np.stack([mask[0] & mask[1], mask[0] & ~mask[1], ~mask[0] & mask[1]])  # and voxels of no class
    share = F.interpolate(torch.from_numpy(exclusive.astype(np.float32))[None], size, mode="trilinear")[0].numpy()
    share = np.concatenate([share, 1 - share.sum(axis=0, keepdims=True)])
    first, second = np.sort(share, axis=0)[:-3:-1]
    found = resampling.resampled_mask(exclusive, size, True)
    assert found.sum(axis=0).max() == 1 and (found.sum(axis=0) == 0).any()
    sure = first - second > 2e-3
    assert np.array_equal(found[:, sure], share.argmax(axis=0)[sure] == np.arange(3)[:, None]) and sure.mean() > 0.7
    single = np.random.default_rng(0).normal(size=(1, 1, 1, 12, 15)).astype(np.float32)
    assert np.allclose(resampling.resampled(single, (3, 12, 15)), np.repeat(single[0], 3, axis=1))


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("wanted", [(1.0, 0.8, 0.8), (2.0, 2.0, 2.0)])
def test_a_sphere_keeps_its_volume_and_its_place(tmp_path, ending, wanted):
    for number, spacing in enumerate(SPACINGS):
        ball = sphere(spacing)
        image = write(tmp_path / f"i{number}{ending}", (ball * 900 - 100).astype(np.int16), spacing)
        mask = write(tmp_path / f"m{number}{ending}", ball.astype(np.uint8), spacing)
        for sample in (Sample("s", image, (mask,)), LabelSample("s", image, mask, 2, 255)):
            assert np.allclose(sample.spacing(), spacing)
            (sample,) = with_spacing([sample], wanted)
            values, classes = sample.load()
            assert values.dtype == np.float32 and values.shape[1:] == classes.shape[1:] and sample.spacing() == wanted
            real = [count * own / new for count, own, new in zip(ball.shape, spacing, values.shape[1:], strict=True)]
            assert np.allclose(real, wanted, rtol=0.05)
            volume = classes[-1].sum() * math.prod(real)
            assert abs(volume / (4 / 3 * math.pi * RADIUS**3) - 1) < 0.04, (spacing, volume)  # 0.2 mm of the radius
            centre = [(places.mean() + 0.5) * size for places, size in zip(np.nonzero(classes[-1]), real, strict=True)]
            assert np.abs(np.array(centre) - 24.3).max() < 0.25
            bright = values[0] > (values[0].max() + values[0].min()) / 2  # the image's ball is where the mask's is
            assert (bright ^ classes[-1]).sum() < 0.06 * classes[-1].sum()
        if len(classes) == 2:
            assert (classes.sum(axis=0) == 1).all()


def test_back_and_forth_is_the_same_grid_and_nearly_the_same_values():
    z, y, x = np.mgrid[:20, :33, :27] / 8.0
    smooth = np.stack([np.sin(z) + np.cos(y) * np.sin(x), x + y - z])[None].astype(np.float32)
    for spacing in SPACINGS:
        size = resampling.size_at(smooth.shape[2:], (1.0, 1.0, 1.0), (0.9, 0.7, spacing[2] / 2))
        back = resampling.resampled(resampling.resampled(smooth, size)[None], smooth.shape[2:])
        assert back.shape == smooth.shape[1:] and np.abs(back - smooth[0]).max() < 0.05
    assert resampling.size_at((10, 3, 1), (1, 1, 1), (3, 3, 3)) == (3, 1, 1)


def test_the_spacing_of_a_data_set_is_the_median_and_finer_across_thick_slices(tmp_path):
    found = [(5.0, 0.7, 0.8), (5.0, 0.7, 0.8), (1.0, 0.9, 0.9), (8.0, 0.8, 0.8), (5.0, 0.8, 0.7)]
    assert resampling.common_spacing(found) == (2.6, 0.8, 0.8)  # 5 mm are more than three times 0.8
    assert resampling.common_spacing([(2.0, 0.7, 0.8), (2.2, 0.8, 0.8), (1.0, 0.9, 0.9)]) == (2.0, 0.8, 0.8)
    paths = [write(tmp_path / f"{n}.mha", sphere(size).astype(np.uint8), size) for n, size in enumerate(SPACINGS)]
    assert dataset_spacing([Sample("s", path, (path,)) for path in paths]) == (1.3, 1.0, 0.9)


def test_headers_are_read_again_only_to_resample(tmp_path, monkeypatch):
    ball = write(tmp_path / "b.mha", sphere(SPACINGS[0]).astype(np.uint8), SPACINGS[0])
    monkeypatch.setattr(resampling, "checked_spacing", lambda *_: pytest.fail("not asked for"))
    for kind in (Sample, LabelSample):
        monkeypatch.setattr(kind, "file_spacing", lambda self: pytest.fail("not asked for"))
    Sample("s", ball, (ball,)).load()
    LabelSample("s", ball, ball, 2, 255).load()


def test_only_files_that_tell_the_size_of_their_voxels_are_resampled(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 4, 4), np.uint8))
    nifti = write(tmp_path / "b.nii.gz", np.ones((4, 4, 4), np.uint8), (3.0, 1.0, 1.0))
    says = r"a.npy does not tell the size of its voxels, and cannot be resampled: save it as NIfTI"
    array = Sample("a", tmp_path / "a.npy", (tmp_path / "a.npy",))
    for refused in (lambda: with_spacing([array], (1, 1, 1)), lambda: dataset_spacing([array])):
        with pytest.raises(InputError, match=says):
            refused()
    with pytest.raises(InputError, match="x does not tell the size"):
        with_spacing([ArraySample("x", np.ones((1, 4, 4, 4)), np.ones((1, 4, 4, 4)))], (1, 1, 1))
    for pair in ((nifti, tmp_path / "a.npy"), (tmp_path / "a.npy", nifti)):  # one of both is enough
        (sample,) = with_spacing([Sample("p", pair[0], (pair[1],))], (1, 1, 1))
        assert sample.load()[1].shape == (1, 12, 4, 4)
    assert spacing_from(None) is None


def test_planes_are_resampled_without_holding_the_volume():
    """512 x 512 x 600 voxels, 600 MiB in float32, of which two planes are held, and a plane of the result."""
    program = """
import numpy as np
from unetpp_fast.data.resampling import planes

class Volume:
    shape = (1, 1, 600, 512, 512)
    def __getitem__(self, where):
        return np.ones((1, len(range(600)[where[2]]), 512, 512), np.float32)

first = next(planes(Volume(), (300, 400, 400)))
before = begin()
assert sum(plane.shape == (1, 400, 400) for plane in planes(Volume(), (300, 400, 400))) == 300
"""
    assert peak_of(program) < 16 * 512 * 512 * 4
