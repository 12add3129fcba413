"""Folders of images with masks or label maps: `read_folder` recognises how they are laid out.

images/<id>.png, masks/<class>/<id>.png   masks, one folder per class; classes may overlap
images/<id>.jpg, masks/<id>.png           label maps, or masks of one class (`IMAGES` and `MASKS` list other names)
<id>.jpg, <id>_mask.png                   the same in one folder (`MARKS`)
train/..., val/...                        each of these in a folder for training and one for validation
images/train/..., masks/train/...         likewise
imagesTr/<id>_0000.png, labelsTr/<id>.png, dataset.json   label maps as nnU-Net v2 keeps them
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import InputError, first_line
from .file_formats import files_by_id, find_images, image_endings
from .label_maps import LabelSample, is_binary, label_classes, palette_of, survey
from .samples import Sample, find_samples

IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentations", "SegmentationClass")
MARKS = ("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "-mask")
TRAINING, VALIDATION = ("train", "training"), ("val", "valid", "validation")
KNOWN = "images/<id>.png with masks/<class>/<id>.png, or images/<id>.png with label maps masks/<id>.png"


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    samples: of training; with `validation` None to be split. found: one line for the user. exclusive: whether the classes
    exclude each other. palette: the colours of exclusive classes. ignore: the value of ignored pixels.
    """

    samples: list
    classes: list[str]
    found: str
    exclusive: bool = False
    palette: list[list[int]] | None = None
    ignore: int | None = None
    validation: list | None = None


@dataclass(frozen=True)
class Pairs:
    """Images, each with one mask file. masks_at: where they are, for messages."""

    images: dict[str, Path]
    masks: dict[str, Path]
    masks_at: Path

    def prefixed(self, name: str) -> Pairs:
        """With `name/` before every id."""
        images, masks = ({f"{name}/{key}": path for key, path in files.items()} for files in (self.images, self.masks))
        return replace(self, images=images, masks=masks)


def read_folder(root: Path, names: Sequence[str] | None = None, ignore: int | None = 255) -> Folder:
    """The samples of a folder in one of the layouts above.

    Args:
        root: the folder.
        names: of the classes of label maps, that of value 0 first; None to count them.
        ignore: the value that label maps give to ignored pixels, or None.

    Raises:
        InputError: the layout is not recognised (the message says what is there and which layout is near), an image has
            no mask, or the label maps are not those of such classes.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    if (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir():
        pairs, known, ignored = _nnunet(root)
        return _of_pairs(pairs, None, names or known, ignored)
    parts = _split_folders(root)
    if parts:
        training, validation = parts
        return _of_pairs(training, validation, names, ignore)
    if _has_class_folders(root):
        if names:
            raise InputError(f"--classes names the values of label maps; here those of {root / 'masks'} do")
        samples, classes = find_samples(root)
        return Folder(samples, classes, f"found {len(samples)} images with masks of {_count(classes)}")
    pairs = _pairs(root)
    if pairs is None:
        raise InputError(_unrecognised(root))
    return _of_pairs(pairs, None, names, ignore)


def _nnunet(root: Path) -> tuple[Pairs, list[str], int | None]:
    """Images, names of the classes and the ignored value of a data set of nnU-Net v2 with one channel file per image."""
    path = root / "dataset.json"
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        values = {name: int(value) for name, value in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no labels such as {{'background': 0, 'a': 1}} ({first_line(error)})") from error
    ignored = values.pop("ignore", None)
    names = sorted(values, key=values.__getitem__)
    if [values[name] for name in names] != list(range(len(names))):
        raise InputError(f"{path} has the labels {values}: expected 0, 1, 2, ... without a gap")
    files = find_images(root / "imagesTr")
    several = next((path for key, path in files.items() if not key.endswith("_0000")), None)
    if several:
        raise InputError(f"{several}: expected one file per image, <id>_0000; save several channels as one colour picture")
    images = {key.removesuffix("_0000"): path for key, path in files.items()}
    return Pairs(images, files_by_id(root / "labelsTr", image_endings()), root / "labelsTr"), names, ignored


def read_names(path: Path) -> list[str]:
    """The names of the classes in a file: one per line, or JSON, a list or an object of names and values.

    Raises:
        InputError: the file cannot be read, the values are not 0, 1, 2, ..., or a name cannot be that of a folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as names of classes ({first_line(error)})") from error
    if isinstance(content, dict):  # {"background": 0, ...} or {"0": "background", ...}
        turned = all(isinstance(name, str) for name in content.values())
        numbers = {str(value): name for name, value in content.items()} if not turned else content
        content = [numbers.get(str(index)) for index in range(len(numbers))]
    names = [name for name in content if name != ""] if isinstance(content, list) else []
    plain = all(isinstance(name, str) and Path(name).name == name and name not in (".", "..") for name in names)
    if len(names) < 2 or not plain or len(set(names)) < len(names):
        raise InputError(f"{path} names the classes {content!r}: expected 2 or more different plain names, of 0 first")
    return names


def _of_pairs(training: Pairs, validation: Pairs | None, names: Sequence[str] | None, ignore: int | None) -> Folder:
    parts = [training, *([validation] if validation else [])]
    for part in parts:
        missing = sorted(set(part.images) - set(part.masks))
        if missing:
            image = part.images[missing[0]]
            raise InputError(f"image {image} has no mask in {part.masks_at} ({len(missing)} such image(s))")
    seen = survey([part.masks[key] for part in parts for key in part.images])
    count = sum(len(part.images) for part in parts)
    split = f", {len(validation.images)} of them for validation" if validation else ""
    if names is None and is_binary(seen):
        made = [[Sample(key, path, (part.masks[key],)) for key, path in part.images.items()] for part in parts]
        found = f"found {count} images with masks of 1 class{split}"
        return Folder(made[0], ["foreground"], found, validation=_second(made))
    classes = label_classes(seen, training.masks_at, names, ignore)
    settings = (len(classes), ignore)
    made = [[LabelSample(key, path, part.masks[key], *settings) for key, path in part.images.items()] for part in parts]
    ignored = f", {ignore} is ignored" if ignore in seen.values else ""
    found = f"found {count} images with label maps of {_count(classes)}{split}{ignored}"
    return Folder(made[0], classes, found, True, palette_of(seen, len(classes)), ignore, _second(made))


def _second(parts: list[list]) -> list | None:
    return parts[1] if len(parts) > 1 else None


def _count(classes: Sequence[str]) -> str:
    return f"{len(classes)} class{'es' if len(classes) != 1 else ''} ({', '.join(classes)})"


def _has_class_folders(root: Path) -> bool:
    folder = root / "masks"
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return (root / "images").is_dir() and any(path.is_dir() for path in inside)


def _split_folders(root: Path) -> tuple[Pairs, Pairs] | None:
    """The images for training and for validation, if folders tell."""
    found: list[Pairs] = []
    for choices in (TRAINING, VALIDATION):
        for name in choices:
            part = _pairs(root / name) or _pairs(root, below=name)
            if part:
                found.append(part.prefixed(name))
                break
    return (found[0], found[1]) if len(found) == 2 else None


def _pairs(root: Path, below: str = "") -> Pairs | None:
    """Images with one mask each, in two folders or in one; None if there are none. below: a folder in both folders."""
    images = next((root / name / below for name in IMAGES if (root / name / below).is_dir()), None)
    masks = next((root / name / below for name in MASKS if (root / name / below).is_dir()), None)
    if images and masks:
        if not files_by_id(masks, image_endings()):
            return None
        found = find_images(images)
        return Pairs(found, _unmarked(files_by_id(masks, image_endings()), found), masks)
    if below or images or masks:
        return None
    files = files_by_id(root, image_endings())
    masks_here = _unmarked(files, {key: path for key, path in files.items() if not key.endswith(MARKS)}, marked=True)
    kept = {key: path for key, path in files.items() if not key.endswith(MARKS)}
    return Pairs(kept, masks_here, root) if kept and masks_here else None


def _unmarked(masks: dict[str, Path], images: dict[str, Path], marked: bool = False) -> dict[str, Path]:
    """The mask files by the id of their image: the same name, or with one of `MARKS` at its end (`marked`: only these)."""
    by_id = {} if marked else {key: path for key, path in masks.items() if key in images}
    for key, path in masks.items():
        for mark in MARKS:
            if key.endswith(mark) and key[: -len(mark)] in images:
                by_id.setdefault(key[: -len(mark)], path)
    return by_id


def _unrecognised(root: Path) -> str:
    """What is in the folder, and which layout is near."""
    inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path.name + "/" for path in inside if path.is_dir()]
    endings = Counter(path.suffix.lower() or path.name for path in inside if path.is_file())
    seen = [*folders[:6], *(["..."] if len(folders) > 6 else [])]
    seen += [f"{count} file(s) {ending}" for ending, count in endings.most_common(3)]
    images = next((name for name in IMAGES if (root / name).is_dir()), None)
    masks = next((name for name in MASKS if (root / name).is_dir()), None)
    if images:
        near = f"put the masks of {images}/<id>.png into masks/<id>.png"
        near += f"; {masks}/ holds no image ({', '.join(image_endings())})" if masks else ""
    elif masks:
        near = f"put the images of {masks}/<id>.png into images/<id>.png"
    elif any(ending in image_endings() for ending in endings):
        near = "name the mask of <id>.jpg <id>_mask.png, or use the folders images/ and masks/"
    else:
        near = KNOWN
    return f"{root} has no layout that is known; it holds {', '.join(seen) or 'nothing'}; nearest: {near} (docs/data.md)"
