"""COCO's JSON: polygons, run lengths, categories, parts, and damaged files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from support.medical_files import write_picture

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.layouts import read_folder
from unetpp_fast.data.samples import check_samples

HEIGHT, WIDTH = 20, 30
BLOB = np.zeros((HEIGHT, WIDTH), bool)
BLOB[3:9, 12:25] = True
BLOB[5:7, 15:18] = False  # a hole, which polygons cannot have
SQUARE = [[2, 4, 14, 4, 14, 16, 2, 16]]  # x, y, ...


def run_lengths(mask: np.ndarray) -> dict:
    """Column by column, first of the background, as the file format counts."""
    values = mask.ravel(order="F")
    changes = [0, *(np.flatnonzero(np.diff(values.astype(int))) + 1).tolist(), values.size]
    counts = np.diff(changes).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if values[0] else counts}


def packed(mask: np.ndarray) -> dict:
    code = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def content(*shapes: tuple, images: int = 2) -> dict:
    """Objects (image, category, segmentation); images a1.jpg, a2.jpg, ..."""
    return {
        "images": [{"id": 10 + k, "file_name": f"a{k}.png", "height": HEIGHT, "width": WIDTH} for k in range(1, images + 1)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": 0, "area": 1}
            for number, (image, category, shape) in enumerate(shapes, 1)
        ],
        "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "wall"}, {"id": 9, "name": "unused"}],
    }


SHAPES = ((11, 7, SQUARE), (11, 3, run_lengths(BLOB)), (11, 7, packed(BLOB)), (12, 3, packed(BLOB)))


def write(
    root: Path, name: str = "annotations.json", images: str = "images", data: dict | None = None, count: int = 2
) -> Path:
    for k in range(1, count + 1):
        write_picture(root / images / f"a{k}.png", np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH))
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data or content(*SHAPES)))
    return root


@pytest.mark.parametrize("images", ["images", ".", "train2017"])
def test_objects_become_masks_that_may_overlap(images, tmp_path):
    folder = read_folder(write(tmp_path, images=images))
    assert folder.found == "found 2 images with outlines of 2 classes (wall, cell)"  # in the order of their numbers
    assert not folder.exclusive and folder.validation is None and check_samples(folder.samples) == 1
    _, (wall, cell) = folder.samples[0].load()
    assert np.array_equal(wall, BLOB)
    square = np.zeros_like(BLOB)
    square[4:16, 2:14] = True
    assert np.array_equal(cell, square | BLOB) and (wall & cell).any()
    _, (wall, cell) = folder.samples[1].load()
    assert np.array_equal(wall, BLOB) and not cell.any() and folder.samples[1].name == "a2"
    assert read_folder(tmp_path / "annotations.json").found == folder.found


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (("annotations/instances_train2017.json", "train2017"), ("annotations/instances_val2017.json", "val2017")),
        (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
    ],
    ids=["coco", "roboflow"],
)
def test_parts(train, validation, tmp_path):
    write(tmp_path, *train)
    write(tmp_path, *validation, data=content((11, 7, SQUARE), images=1), count=1)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
    folder = read_folder(tmp_path)
    assert folder.found == "found 3 images with outlines of 2 classes (wall, cell), 1 of them for validation"
    assert folder.validation[0].image.parent.name == validation[1] and folder.samples[0].image.parent.name == train[1]
    assert folder.validation[0].load()[1].shape == (2, HEIGHT, WIDTH)


def changed(**values) -> dict:
    return {**content(*SHAPES), **values}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (content((11, 99, SQUARE)), "has objects of the category 99, which it does not list"),
        (content((99, 7, SQUARE)), "the object 1 is on image 99, which is not listed"),
        (content(*SHAPES, images=3), r"lists the image a3\.png, which is not in .*images"),
        (content((11, 7, [])), "the object 1 of a1 has no outline of 3 points or more: boxes and points"),
        (content((11, 7, [[1, 2, 3, 4]])), "the object 1 of a1 has no outline of 3 points or more"),
        (content((11, 7, {"size": [20, 31], "counts": [620]})), r"run lengths of \[20, 31\] for an image of \[20, 30\]"),
        (content((11, 7, {"size": [20, 30], "counts": [5, 6]})), "has run lengths of 11 pixels: the file is damaged"),
        (content((11, 7, {"size": [20, 30]})), "the object 1 of a1 cannot be drawn"),
        (content((11, 7, [["x"] * 6])), "the object 1 of a1 cannot be drawn"),
        (changed(images=[{"id": 11}, {"id": 12}]), "is no complete COCO file: it lacks 'file_name'"),
        (changed(categories=[{"id": 7}]), "has a category without id or name"),
        (changed(categories=[{"id": 7, "name": "a"}, {"id": 3, "name": "a"}]), r"names the classes \['a', 'a'\]"),
        (changed(annotations=[]), "outlines no object"),
        (changed(images=[]), "the object 1 is on image 11, which is not listed"),
    ],
)
def test_damaged_files_are_named(data, says, tmp_path):
    with pytest.raises(InputError, match=says):
        check_samples(read_folder(write(tmp_path, data=data)).samples)


def test_images_of_another_size_and_unclear_parts(tmp_path, monkeypatch):
    root = write(tmp_path)
    write_picture(root / "images/a2.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    with pytest.raises(InputError, match=r"a2\.png is 30x20 pixels, upright, but .*annotations\.json says 20x30"):
        check_samples(read_folder(root).samples)
    write(root, "more.json")
    with pytest.raises(InputError, match=r"the COCO files annotations\.json, more\.json: give one with --data"):
        read_folder(root)
    (root / "more.json").unlink()
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(InputError, match=r"pycocotools is missing: pip install 'unetpp_fast\[coco\]'"):
        read_folder(root)
