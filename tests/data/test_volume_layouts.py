"""Volumes and images of several files: nnU-Net's layout, lists of files, DICOM series, other formats, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from support.medical_files import AFFINE, cut, write_itk, write_nifti, write_picture, write_series

from unetpp_fast.common.errors import InputError
from unetpp_fast.data import prediction_files
from unetpp_fast.data.file_formats import read_stored
from unetpp_fast.data.images import STANDARD, standardise
from unetpp_fast.data.layouts import read_folder
from unetpp_fast.data.samples import check_samples

SHAPE = (4, 6, 8)  # z, y, x
LABELS = (np.arange(192) // 64).reshape(SHAPE).astype(np.uint8)
VALUES = np.random.default_rng(0).integers(-900, 900, (2, *SHAPE)).astype(np.int16)  # two channels


def write_volume(path: Path, values: np.ndarray) -> Path:
    """Writes `[z, y, x]` in the format of the path, everywhere on the same grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    if kind.startswith("nii"):
        return write_nifti(path, values.T)
    if kind in ("npy", "npz"):
        np.save(path, values) if kind == "npy" else np.savez(path, values)
        return path
    return write_itk(path, values)


def write_nnunet(root: Path, ending: str = ".nii.gz", channels: int = 2, ids: str = "abc") -> Path:
    for key in ids:
        for channel in range(channels):
            write_volume(root / f"imagesTr/case_{key}_{channel:04d}{ending}", VALUES[channel])
        write_volume(root / f"labelsTr/case_{key}{ending}", LABELS)
    names = {str(number): name for number, name in enumerate(("T1", "FLAIR")[:channels])}
    content = {"channel_names": names, "labels": {"background": 0, "edema": 1, "core": 2}, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".npy", ".npz"])
def test_every_format_is_read_alike(ending, tmp_path):
    folder = read_folder(write_nnunet(tmp_path, ending))
    assert folder.found == ("found 3 volumes with label maps of 3 classes (background, edema, core), 2 channels (T1, FLAIR)")
    assert (folder.spatial_dims, folder.channel_files, folder.exclusive) == (3, 2, True)
    assert check_samples(folder.samples) == 2 and [sample.name for sample in folder.samples] == [
        "case_a",
        "case_b",
        "case_c",
    ]
    image, mask = folder.samples[1].load()
    assert np.array_equal(image, standardise(VALUES)) and np.array_equal(mask.argmax(axis=0), LABELS) and mask.sum() == 192


def lose_channel(root: Path) -> None:
    (root / "imagesTr/case_b_0001.nii.gz").unlink()


def add_channel(root: Path) -> None:
    write_volume(root / "imagesTr/case_b_0002.nii.gz", VALUES[0])


def other_class(root: Path) -> None:
    write_volume(root / "labelsTr/case_b.nii.gz", LABELS + np.uint8(1))


def other_size(root: Path) -> None:
    write_volume(root / "labelsTr/case_b.nii.gz", LABELS[:, :5])


def other_channel_size(root: Path) -> None:
    write_volume(root / "imagesTr/case_b_0001.nii.gz", VALUES[0, :3])


def other_grid(root: Path) -> None:
    write_nifti(root / "labelsTr/case_b.nii.gz", LABELS.T, AFFINE @ np.diag([-1, 1, 1, 1]))


def other_spacing(root: Path) -> None:
    write_nifti(root / "imagesTr/case_b_0001.nii.gz", VALUES[1].T, np.diag([0.7, 0.8, 5, 1]))


def truncate(root: Path) -> None:
    cut(root / "imagesTr/case_b_0000.nii.gz", 0.5)


def spoil_labels(root: Path) -> None:
    write_volume(root / "labelsTr/case_b.nii.gz", LABELS * np.float32(0.4))


def put_nan(root: Path) -> None:
    write_volume(root / "imagesTr/case_b_0000.nii.gz", np.full(SHAPE, np.nan, np.float32))


def lose_label(root: Path) -> None:
    (root / "labelsTr/case_b.nii.gz").unlink()


def flatten_label(root: Path) -> None:
    write_volume(root / "labelsTr/case_b.nii.gz", LABELS[:1])


def regions(root: Path) -> None:
    (root / "dataset.json").write_text('{"labels": {"background": 0, "whole": [1, 3], "core": 3}}')


def ignored_regions(root: Path) -> None:
    (root / "dataset.json").write_text('{"labels": {"background": 0, "whole": [1, 2], "ignore": 3}}')


def gap(root: Path) -> None:
    (root / "dataset.json").write_text('{"labels": {"background": 0, "a": 2}}')


DAMAGE = {
    lose_channel: r"image case_b has no channel _0001 \(FLAIR\); there is case_b_0000\.nii\.gz",
    add_channel: r"case_b_0002\.nii\.gz is a channel that dataset\.json does not name: it has 2",
    other_class: r"label maps with the values 0, 1, 2, 3, expected 0 to 2",
    other_size: r"case_b\.nii\.gz is 4x5x8 but its image .*case_b_0000\.nii\.gz is 4x6x8",
    other_channel_size: r"but its image .*case_b_0001\.nii\.gz is 3x6x8",
    other_grid: r"case_b\.nii\.gz and volume .* differ in affine",
    other_spacing: r"case_b_0001\.nii\.gz differ in spacing",
    truncate: r"case_b_0000\.nii\.gz cannot be read as NIfTI",
    spoil_labels: r"label map .*case_b\.nii\.gz holds 0\.4",
    put_nan: r"case_b_0000\.nii\.gz holds NaN",
    lose_label: r"case_b_0000\.nii\.gz has no mask in .*labelsTr \(1 such",
    flatten_label: r"case_b\.nii\.gz is an image but .* is a volume",
    regions: r"with the value 2, which is in none of the regions \{'whole': \[1, 3\], 'core': \[3\]\}",
    ignored_regions: "expected whole numbers, and no ignored value",
    gap: r"expected 0, 1, 2, \.\.\. without a gap",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_nnunet_folders_are_named(damage, tmp_path):
    damage(write_nnunet(tmp_path))
    with pytest.raises(InputError, match=DAMAGE[damage]):
        check_samples(read_folder(tmp_path).samples)


def test_nnunet_without_its_json_with_colours_and_with_a_test_set(tmp_path):
    write_nnunet(tmp_path, channels=1)
    for path in [*(tmp_path / "imagesTr").iterdir(), *(tmp_path / "labelsTr").iterdir()]:
        copy = Path(str(path).replace("Tr/case", "Ts/more"))
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    folder = read_folder(tmp_path)
    assert folder.found.startswith("found 6 volumes with label maps of 3 classes (background, edema, core), 3 for testing")
    assert folder.channel_files == 1 and [sample.name for sample in folder.test] == ["more_a", "more_b", "more_c"]
    (tmp_path / "dataset.json").unlink()
    assert read_folder(tmp_path).classes == ["background", "1", "2"]
    colours = tmp_path / "colours"
    write_picture(colours / "imagesTr/a_0000.png", np.full((6, 8, 3), 7, np.uint8))
    write_picture(colours / "labelsTr/a.png", LABELS[0] + np.eye(6, 8, dtype=np.uint8))
    names = {"0": "R", "1": "G", "2": "B"}
    (colours / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": {"background": 0, "a": 1}}))
    assert check_samples(read_folder(colours).samples) == 3


def test_regions_of_nnunet_overlap(tmp_path):
    write_nnunet(tmp_path)
    labels = {"background": 0, "whole/tumor": [1, 2], "core": [2]}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2]}))
    folder = read_folder(tmp_path)
    assert (
        folder.found
        == "found 3 volumes with label maps of 2 regions that may overlap (whole-tumor, core), 2 channels (0, 1)"
    )
    assert not folder.exclusive and folder.classes == ["whole-tumor", "core"] and check_samples(folder.samples) == 2
    image, (whole, core) = folder.samples[0].load()
    assert np.array_equal(whole, LABELS > 0) and np.array_equal(core, LABELS > 1)
    assert np.array_equal(image, standardise(VALUES)) and np.array_equal(folder.samples[0].values(), VALUES)
    assert read_folder(tmp_path, ["background", "edema", "core"]).exclusive


def write_list(root: Path, content: dict, name: str = "dataset.json") -> Path:
    for key in "abc":
        write_nifti(root / f"imagesTr/{key}.nii.gz", np.moveaxis(VALUES, 0, -1).swapaxes(0, 2))  # x, y, z, channels
        write_volume(root / f"labelsTr/{key}.nii.gz", LABELS)
    (root / name).write_text(json.dumps(content))
    return root


ENTRIES = [{"image": f"./imagesTr/{key}.nii.gz", "label": f"./labelsTr/{key}.nii.gz"} for key in "abc"]


def test_decathlon(tmp_path):
    """Channels are the last axis of a NIfTI file there; macOS leaves hidden files beside."""
    content = {
        "labels": {"0": "background", "1": "edema", "2": "core"},
        "training": ENTRIES,
        "test": ["./imagesTs/d.nii.gz"],
    }
    write_list(tmp_path, content)
    (tmp_path / "imagesTr/._a.nii.gz").write_bytes(b"x")
    folder = read_folder(tmp_path)
    assert folder.found == "found 3 volumes with label maps of 3 classes (background, edema, core), listed in dataset.json"
    image, mask = folder.samples[0].load()
    assert np.array_equal(image, standardise(VALUES)) and np.array_equal(mask.argmax(axis=0), LABELS)
    assert [sample.name for sample in folder.samples] == ["a", "b", "c"] and folder.validation is None
    assert read_folder(tmp_path / "dataset.json").found == folder.found


def test_lists_of_monai_with_folds_channels_and_parts(tmp_path):
    for key, name in (("a", "x/seg"), ("b", "y/seg"), ("c", "z/seg")):
        for channel in range(2):
            write_volume(tmp_path / f"{name[0]}/{channel}.nii", VALUES[channel])
        write_volume(tmp_path / f"{name}.nii", LABELS + (key == "a"))
    entries = [{"image": [f"{k}/0.nii", f"{k}/1.nii"], "label": f"{k}/seg.nii", "fold": n} for n, k in enumerate("xyz")]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    folder = read_folder(tmp_path, fold=1)
    assert folder.found == (
        "found 3 volumes with label maps of 4 classes (background, 1, 2, 3), 1 of them for validation, "
        "listed in list.json, fold 1"
    )
    with pytest.raises(InputError, match=r"list\.json has the folds 0, 1, 2: there is no fold 7"):
        read_folder(tmp_path, fold=7)
    assert [sample.name for sample in (*folder.samples, *folder.validation)] == ["x/seg", "z/seg", "y/seg"]
    assert check_samples(folder.samples) == 2
    entries[2]["image"] = "z/0.nii"
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    with pytest.raises(InputError, match=r"lists 2 file\(s\) of 0\.nii but 1 of 0\.nii: a channel is missing"):
        read_folder(tmp_path, fold=1)


def test_a_list_of_nnunets_first_version(tmp_path):
    write_nnunet(tmp_path, ids="ab")
    entries = [{"image": f"./imagesTr/case_{k}.nii.gz", "label": f"./labelsTr/case_{k}.nii.gz"} for k in "ab"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    assert check_samples(read_folder(tmp_path).samples) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"training": [{"image": "imagesTr/a.nii.gz"}]}, r"has the entry .*expected \{\"image\""),
        (
            {"training": [{"image": "imagesTr/q.nii.gz", "label": "labelsTr/a.nii.gz"}]},
            r"names imagesTr/q\.nii\.gz, which does",
        ),
        ({"training": [{"image": 7, "label": "labelsTr/a.nii.gz"}]}, "has 7 where the name of a file should be"),
        ({"training": []}, "lists no image for training"),
        ({"training": ENTRIES, "labels": {"0": "a", "2": "b"}}, "has the labels .* without a gap"),
        ({"training": ENTRIES, "labels": {"0": "a", "1": "b", "2": "a"}}, r"names the classes \['a', 'b', 'a'\]"),
        ({"training": ENTRIES, "labels": {"0": "a", "1": "b"}}, "the values 0, 1, 2, expected 0 to 1"),
    ],
)
def test_damaged_lists_are_named(content, says, tmp_path):
    with pytest.raises(InputError, match=says):
        read_folder(write_list(tmp_path, content))


@pytest.mark.parametrize("masks", ["masks/a.nii.gz", "masks/organ/a.nrrd"])
def test_dicom_series_with_masks_of_other_formats(masks, tmp_path):
    """The slices are ordered by position, not by name, and the mask must lie on their grid."""
    pixels = write_series(tmp_path / "images/a", SHAPE)
    binary = (LABELS > 1).astype(np.uint8)
    sitk_mask = sitk.GetImageFromArray(binary)
    sitk_mask.CopyInformation(sitk.ReadImage(sorted(map(str, (tmp_path / "images/a").iterdir()), reverse=True)))
    (tmp_path / masks).parent.mkdir(parents=True)
    sitk.WriteImage(sitk_mask, str(tmp_path / masks))
    folder = read_folder(tmp_path)
    assert folder.found == f"found 1 volume with masks of 1 class{' (organ)' if 'organ' in masks else ''}"
    assert folder.spatial_dims == 3 and not folder.exclusive
    image, mask = folder.samples[0].load()
    assert np.array_equal(image, standardise(pixels[None])) and np.array_equal(mask[0], binary > 0)
    sitk_mask.SetOrigin((5.0, 0.0, 0.0))
    sitk.WriteImage(sitk_mask, str(tmp_path / masks))
    with pytest.raises(InputError, match="differ in affine"):
        folder.samples[0].load()


def lose_slice(folder: Path) -> None:
    next(path for path in sorted(folder.iterdir()) if "2" in path.name).unlink()


def spoil_slice(folder: Path) -> None:
    cut(sorted(folder.iterdir())[1], 0.2)


def second_series(folder: Path) -> None:
    write_series(folder, SHAPE, start=100)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_slice, "lacks a slice, or holds one twice: its slices are 2.5 to 5 mm apart"),
        (spoil_slice, r"\.dcm cannot be read as DICOM"),
        (second_series, "holds slices of 2 series: use one folder per series"),
    ],
)
def test_damaged_series_are_named(damage, says, tmp_path):
    write_series(tmp_path / "a", SHAPE)
    damage(tmp_path / "a")
    with pytest.raises(InputError, match=says):
        read_stored(tmp_path / "a")


def test_white_is_zero_and_single_files_of_dicom(tmp_path):
    """A file of one plane is an image, in training and for a network in 2D alike; MONOCHROME1 is turned over."""
    pixels = write_series(tmp_path / "images", (2, 6, 8))
    for index, path in enumerate(sorted((tmp_path / "images").iterdir(), reverse=True)):
        (tmp_path / "masks").mkdir(exist_ok=True)
        np.save(tmp_path / f"masks/{path.stem}.npy", (pixels[index] > 0).astype(np.uint8))
        if index:
            header = pydicom.dcmread(path)
            header.PhotometricInterpretation = "MONOCHROME1"
            header.save_as(path)
    folder = read_folder(tmp_path)
    assert folder.found == "found 2 images with masks of 1 class" and folder.spatial_dims == 2
    turned, plain = (sample.load()[0] for sample in folder.samples)
    assert np.array_equal(plain, standardise(pixels[:1])) and np.allclose(turned, standardise(-pixels[1:]), atol=1e-6)
    source = prediction_files.read(folder.samples[0].image, 2, 1)
    assert np.allclose(prediction_files.Prepared(source, source.images()[0], STANDARD)[0, :, :, :], turned, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "channels"), [((6, 8), 1), ((3, 6, 8), 3), ((6, 8, 3), 3), ((1, 6, 8), 1)], ids=["YX", "CYX", "YXC", "1YX"]
)
def test_arrays_are_read_as_their_masks_say(shape, channels, tmp_path):
    values = np.random.default_rng(1).random(shape)
    for folder, array in (("images", values), ("masks", np.eye(6, 8))):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", array)
    (sample,) = read_folder(tmp_path).samples
    image, _ = sample.load()
    wanted = np.moveaxis(values, -1, 0) if shape[-1] == 3 else values.reshape(-1, 6, 8)
    assert np.array_equal(image, standardise(wanted)) and check_samples([sample]) == channels


def test_formats_that_need_an_extra_name_it(tmp_path, monkeypatch):
    import sys

    write_nnunet(tmp_path, ".nrrd")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"SimpleITK is missing: pip install 'unetpp_fast\[volumes\]'"):
        read_folder(tmp_path)
