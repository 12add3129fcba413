"""The split that a data set comes with is used: folders, lists of ids, and nnU-Net's folds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.folders import write_nuclei
from support.medical_files import write_picture

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.layouts import read_folder

LABELS = (np.arange(48) // 12).reshape(6, 8).astype(np.uint8)


def write(root: Path, *names: str, folders: tuple[str, str] = ("images", "masks")) -> Path:
    for name in names:
        write_picture(root / folders[0] / f"{name}.png", LABELS * 30)
        write_picture(root / folders[1] / f"{name}.png", LABELS)
    return root


def names(samples: list) -> list[str]:
    return [sample.name for sample in samples]


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("", ("a\nb\n", "c\n")),
        ("ImageSets/Segmentation", ("a.png\nb.png", "c.png")),
        ("splits", ("# ids\nimages/a.png masks/a.png\nimages/b.png masks/b.png\n\n", "images/c.png masks/c.png")),
    ],
)
def test_lists_of_ids(place, lines, tmp_path):
    """As in VOC: an image that no list names, with or without a mask, is left out."""
    root = write(tmp_path, *"abcde")
    (root / "masks/e.png").unlink()
    (root / place).mkdir(parents=True, exist_ok=True)
    for name, text in zip(("train", "val"), lines, strict=True):
        (root / place / f"{name}.txt").write_text(text)
    folder = read_folder(root)
    assert folder.found == (
        "found 3 images with label maps of 4 classes (background, 1, 2, 3), 1 of them for validation, "
        "split by train.txt and val.txt, 2 left out"
    )
    assert names(folder.samples) == ["a", "b"] and names(folder.validation) == ["c"] and folder.test is None
    (root / place / "test.txt").write_text("d")
    assert names(read_folder(root).test) == ["d"]


def test_lists_divide_folders_of_classes_too(tmp_path):
    write_nuclei(tmp_path, count=4, classes=("a", "b"))
    (tmp_path / "train.txt").write_text("cell0\ncell2\ncell3\n")
    folder = read_folder(tmp_path)
    assert names(folder.samples) == ["cell0", "cell2", "cell3"] and folder.validation is None
    assert folder.found == "found 3 images with masks of 2 classes (a, b), split by train.txt, 1 left out"


def test_folds_of_nnunet(tmp_path):
    root = write(tmp_path, *"abcd", folders=("imagesTr", "labelsTr"))
    folds = [{"train": ["b", "c", "d"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b", "d"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    assert names(read_folder(root).validation) == ["a"]
    folder = read_folder(root, fold=1)
    assert names(folder.samples) == ["a", "c"] and names(folder.validation) == ["b", "d"]
    assert folder.found.endswith("2 of them for validation, split by splits_final.json, fold 1 of 2") and folder.has_folds
    with pytest.raises(InputError, match=r"splits_final\.json holds the folds 0 to 1: there is no fold 2"):
        read_folder(root, fold=2)


def test_folders_of_classes_in_folders_of_parts(tmp_path):
    for part in ("train", "val", "test"):
        write_nuclei(tmp_path / part, count=2, classes=("a", "b"))
    folder = read_folder(tmp_path)
    assert folder.found == "found 6 images with masks of 2 classes (a, b), 2 of them for validation, 2 for testing"
    assert names(folder.test) == ["test/cell0", "test/cell1"] and folder.test[0].load()[1].shape == (2, 48, 48)
    (tmp_path / "val/masks/b").rename(tmp_path / "val/masks/c")
    with pytest.raises(InputError, match=r"val/masks holds the classes a, c, .*train/masks a, b: use the same"):
        read_folder(tmp_path)


def test_training_and_test_without_validation(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / part, "a", "b")
    folder = read_folder(tmp_path)
    assert names(folder.samples) == ["train/a", "train/b"] and folder.validation is None
    assert names(folder.test) == ["test/a", "test/b"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train.txt": "a\nq\n"}, r"train\.txt names 'q', which is no image of the folder; ids are such as 'a'"),
        ({"train.txt": "a\n", "val.txt": "b\na\n"}, r"val\.txt names 'a' twice, for training and for validation"),
        ({"train.txt": "a\na\n"}, r"train\.txt names 'a' twice, for training: an image has one place"),
        ({"train.txt": "\n"}, r"train\.txt names no image"),
        ({"train.txt": b"\xff\xfe\xff"}, r"train\.txt cannot be read as a list"),
        ({"splits_final.json": "["}, r"splits_final\.json cannot be read as JSON"),
        ({"splits_final.json": '[{"train": [1], "val": []}]'}, r"splits_final\.json must be a list of folds"),
        ({"splits_final.json": "[]"}, r"splits_final\.json must be a list of folds"),
        ({"splits_final.json": '[{"train": ["a"], "val": []}]'}, "has no images for training or for validation"),
    ],
)
def test_damaged_splits_are_named(files, says, tmp_path):
    root = write(tmp_path, *"ab")
    for name, text in files.items():
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says):
        read_folder(root)
