"""Folders of images with masks or label maps: recognised by themselves, or one error that says what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import write_nuclei
from support.medical_files import write_picture

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.class_names import read_names
from unetpp_fast.data.images import standardise
from unetpp_fast.data.label_maps import voc_palette
from unetpp_fast.data.layouts import read_folder

LABELS = (np.arange(48) // 12).reshape(6, 8).astype(np.uint8)
BINARY = (LABELS > 1) * np.uint8(255)
GREY = LABELS * 30


def write(root: Path, *pairs: tuple[str, str], labels: np.ndarray = LABELS, image: np.ndarray = GREY) -> Path:
    for picture, mask in pairs:
        write_picture(root / picture, image)
        write_picture(root / mask, labels)
    return root


LAYOUTS = {
    "masks": [(f"images/{k}.jpg", f"masks/{k}.png") for k in "ab"],
    "labels": [(f"images/{k}.jpg", f"labels/{k}.png") for k in "ab"],
    "voc": [(f"JPEGImages/{k}.jpg", f"SegmentationClass/{k}.png") for k in "ab"],
    "marked": [(f"imgs/{k}.jpg", f"masks/{k}_mask.png") for k in "ab"],
    "one folder": [(f"{k}.jpg", f"{k}_mask.png") for k in "ab"],
    "split": [("train/images/a.png", "train/masks/a.png"), ("val/images/b.png", "val/masks/b.png")],
    "split inside": [("images/train/a.png", "labels/train/a.png"), ("images/val/b.png", "labels/val/b.png")],
    "split one folder": [("train/a.jpg", "train/a_seg.png"), ("valid/b.jpg", "valid/b_seg.png")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("binary", [False, True], ids=["labels", "binary"])
def test_layouts_are_recognised(layout, binary, tmp_path):
    folder = read_folder(write(tmp_path, *LAYOUTS[layout], labels=BINARY if binary else LABELS))
    of = "masks of 1 class" if binary else "label maps of 4 classes (background, 1, 2, 3)"
    split = layout.startswith("split")
    assert folder.found == f"found 2 images with {of}" + (", 1 of them for validation" if split else "")
    assert (folder.validation is not None) == split and folder.exclusive == (not binary)
    samples = [*folder.samples, *(folder.validation or [])]
    assert [sample.name[-1] for sample in samples] == ["a", "b"]
    for sample in samples:
        image, mask = sample.load()
        wanted = BINARY[None] > 0 if binary else np.arange(4).reshape(4, 1, 1) == LABELS
        assert image.shape == (1, 6, 8) and np.array_equal(mask, wanted)


def test_nnunet(tmp_path):
    write(tmp_path, *((f"imagesTr/{k}_0000.png", f"labelsTr/{k}.png") for k in "ab"))
    (tmp_path / "dataset.json").write_text(
        '{"labels": {"background": 0, "b": 2, "a": 1, "ignore": 3}, "file_ending": ".png"}'
    )
    folder = read_folder(tmp_path)
    assert folder.found == "found 2 images with label maps of 3 classes (background, a, b), 3 is ignored"
    assert not folder.samples[0].load()[1][:, LABELS == 3].any() and folder.samples[0].name == "a"
    write_picture(tmp_path / "imagesTr/a_0001.png", GREY)
    with pytest.raises(InputError, match=r"image b has no channel _0001; there is b_0000\.png"):
        read_folder(tmp_path)
    for text in ('{"labels": {"a": "b"}}', "{}", "["):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json has no labels"):
            read_folder(tmp_path)


def test_class_folders_stay_masks(tmp_path):
    folder = read_folder(write_nuclei(tmp_path, count=3, classes=("a", "b")))
    assert folder.found == "found 3 images with masks of 2 classes (a, b)" and not folder.exclusive
    with pytest.raises(InputError, match="--classes names the values of label maps"):
        read_folder(tmp_path, ["a", "b"])


def test_values_names_and_ignored_pixels(tmp_path):
    holed = LABELS.copy()
    holed[0, 0] = 255
    root = write(tmp_path, *LAYOUTS["masks"], labels=holed)
    folder = read_folder(root)
    assert folder.found.endswith("4 classes (background, 1, 2, 3), 255 is ignored")
    assert not folder.samples[0].load()[1][:, 0, 0].any() and folder.samples[0].load()[1][:, 1:].any(axis=0).all()
    assert folder.palette == voc_palette(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert read_folder(root, list("abcdef")).classes == list("abcdef")  # two of them occur nowhere
    for names, ignore, says in (
        (None, None, "the values 0, 1, 2, 3, 255, expected 0, 1, 2, ... without a gap: name all"),
        (list("abc"), 255, "the values 0, 1, 2, 3, expected 0 to 2"),
        (None, 2, "without a gap"),
    ):
        with pytest.raises(InputError, match=says):
            read_folder(root, names, ignore)
    write_picture(root / "masks/a.png", (LABELS > 1).astype(np.uint8))
    write_picture(root / "masks/b.png", BINARY)
    with pytest.raises(InputError, match="mixes masks of 0 and 1 with masks of 0 and 255"):
        read_folder(root)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "it holds nothing; nearest: images/<id>.png with masks"),
        (["images/a.png"], r"it holds images/; nearest: put the masks of images/<id>\.png into masks/<id>\.png"),
        (["labels/a.png"], r"it holds labels/; nearest: put the images of labels/"),
        (["images/a.png", "masks/a.txt"], r"masks/ holds no image \(\.png"),
        (["a.png", "b.png"], r"it holds 2 file\(s\) \.png; nearest: name the mask of <id>\.png <id>_mask\.png"),
        (["x/a.png", "readme.md"], r"it holds x/, 1 file\(s\) \.md; nearest: images/"),
        (["images/a.png", "images/b.png", "masks/a.png"], r"b\.png has no mask in .*masks \(1 such"),
        (["images/a.png", "masks/seg_a.png"], r"call it like the image, or <id>_mask; there is seg_a\.png"),
        (["x/images/a.png", "x/masks/a.png"], "it holds x/; nearest: give .*/x "),
        (
            ["images/train/a.png", "masks/train/a.png"],
            "put the images into images/ itself, or into images/train and images/val",
        ),
        (["imagesTr/a.png"], r"put the masks of imagesTr/<id>\.png into labelsTr/<id>\.png"),
        (["p/t1.npy", "p/seg.npy"], r'list the files in dataset\.json as \{"training"'),
        (["a.json"], r'list the files in dataset\.json as \{"training"'),
    ],
)
def test_what_is_not_recognised_is_described(files, says, tmp_path):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text") if path.suffix in (".md", ".txt", ".json", ".npy") else Image.fromarray(LABELS).save(path)
    with pytest.raises(InputError, match=says):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        read_folder(tmp_path / "nowhere")


def test_archives_of_an_image_and_its_mask(tmp_path):
    for key in "ab":
        np.savez(tmp_path / f"{key}.npz", image=GREY.astype(np.float32), label=LABELS)
    folder = read_folder(tmp_path)
    assert folder.found == "found 2 images with label maps of 4 classes (background, 1, 2, 3)"
    image, mask = folder.samples[0].load()
    assert np.array_equal(image, standardise(GREY[None])) and np.array_equal(mask.argmax(axis=0), LABELS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.txt", "sky\ncell\n"),
        ("n.json", '["sky", "cell"]'),
        ("n.json", '{"sky": 0, "cell": 1}'),
        ("n.json", '{"1": "cell", "0": "sky"}'),
    ],
)
def test_names_of_classes(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_names(tmp_path / name) == ["sky", "cell"]


@pytest.mark.parametrize("text", ["[]", '["a"]', '["a", "a"]', '["a", "../b"]', '["a", 1]', '{"a": 0, "b": 2}', "7", "{"])
def test_names_that_cannot_be_used(text, tmp_path):
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(InputError, match=r"n\.json (names the classes|cannot be read)"):
        read_names(tmp_path / "n.json")
