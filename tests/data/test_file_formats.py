"""The table of file formats: one entry makes a format known to prediction and to training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from unetpp_fast.common.errors import InputError
from unetpp_fast.data import file_formats, prediction_files
from unetpp_fast.data.file_formats import FORMATS, FileFormat, files_by_id, find_images, format_of, volume_endings
from unetpp_fast.data.readers.nodule_crops import crop_folders
from unetpp_fast.data.stored import Stored


def read_text(path) -> np.ndarray:
    """`[z, y, x]` from a text file: its shape in the first line, its values in the second."""
    shape, values = path.read_text().splitlines()
    return np.array(values.split(), np.float32).reshape([int(size) for size in shape.split()])


def write_text(stream, values: np.ndarray, stored: Stored | None = None) -> None:
    stream.write(" ".join(map(str, values.shape)).encode() + b"\n")
    stream.write(" ".join(str(value) for value in values.ravel()).encode())


TEXT = FileFormat("text", (".vol.txt",), lambda path: Stored(path, read_text(path), "ZYX"), write_text, foreground=7)


@pytest.fixture
def text_volumes(tmp_path, monkeypatch):
    """Two crops with masks as text files, a format that an added entry describes."""
    monkeypatch.setattr(file_formats, "FORMATS", (*FORMATS, TEXT))
    volume = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    for folder, values in (("images", volume), ("masks/nodule", (volume > 12).astype(np.uint8))):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a", "b"):
            with open(tmp_path / folder / f"{name}.vol.txt", "wb") as stream:
                write_text(stream, values)
    return tmp_path


def test_an_added_format_is_predicted(text_volumes):
    files = prediction_files.find(text_volumes / "images")
    assert list(files) == ["a", "b"] and prediction_files.find(*files["b"]) == {"b": files["b"]}
    source = prediction_files.read(files["a"], 3, 1)
    assert source.shape == (2, 3, 4) and not source.is_picture
    source.write(text_volumes / "out", "a", source.values > 12)
    assert np.array_equal(read_text(text_volumes / "out/a.vol.txt"), (source.values > 12) * np.float32(7))


def test_an_added_format_is_trained_on(text_volumes):
    samples, classes = crop_folders(text_volumes)
    assert [sample.name for sample in samples] == ["a", "b"] and classes == ["nodule"]
    image, mask = samples[0].load()
    assert image.shape == mask.shape == (1, 2, 3, 4) and mask.sum() == 11
    np.save(text_volumes / "masks/nodule/b.npy", np.zeros((2, 3, 4)))
    (text_volumes / "masks/nodule/b.vol.txt").unlink()
    with pytest.raises(InputError, match=r"mask .*b\.npy and volume .*b\.vol\.txt have different formats"):
        crop_folders(text_volumes)


def test_files_are_listed_by_id(tmp_path):
    for name in ("b.nii.gz", "a.NII", ".c.nii", "d.txt", "e.npy"):
        (tmp_path / name).touch()
    assert list(files_by_id(tmp_path, volume_endings())) == ["a", "b", "e"]
    assert files_by_id(tmp_path / "nowhere", volume_endings()) == {}
    (tmp_path / "e.nii").touch()
    with pytest.raises(InputError, match=r"e\.nii and .*e\.npy have the same id"):
        files_by_id(tmp_path, volume_endings())


def test_images_are_pictures_and_tiff(tmp_path):
    for name in ("a.png", "b.tif"):
        Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "c.npy").touch()
    assert list(find_images(tmp_path)) == ["a", "b"]
    assert [format_of(tmp_path / name).name for name in ("A.JPEG", "b.tiff", "c.npy")] == ["an image", "TIFF", "an array"]
    with pytest.raises(InputError, match=r"c\.txt has an unknown format: known are \.png, "):
        format_of(tmp_path / "c.txt")


def test_endings_are_those_of_one_format():
    endings = file_formats.all_endings()
    assert len(endings) == len(set(endings)) and not any(
        long != short and long.endswith(short) for long in endings for short in endings
    )
