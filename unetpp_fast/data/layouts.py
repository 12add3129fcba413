"""Folders of images with masks or label maps: `read_folder` recognises how they are laid out.

images/<id>.png, masks/<class>/<id>.png   masks, one folder per class; classes may overlap
images/<id>.jpg, masks/<id>.png           label maps, or masks of one class (`IMAGES` and `MASKS` list other names)
<id>.jpg, <id>_mask.png                   the same in one folder (`pairs.MARKS`), or <id>.npz with the arrays image and mask
train/..., val/..., test/...              each of these in a folder for training, one for validation and one for testing
images/train/..., masks/train/...         likewise
imagesTr/<id>_0000.nii.gz, labelsTr/<id>.nii.gz, dataset.json   label maps as nnU-Net keeps them
dataset.json with "training"              a list of files as the Decathlon and MONAI keep it
instances_train.json, ...                 outlines as COCO keeps them

The files are in any format of `file_formats`. train.txt and val.txt, or splits_final.json, divide what folders do not
(`splits`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from . import itk
from .file_formats import all_endings, ending_of, files_by_id, find_images, holds_mask, volume_endings
from .pairs import MARKS, Folder, Pairs, Parts, by_image, class_folders, folder_of, single_files
from .readers.coco import coco_folder
from .readers.decathlon import file_list
from .readers.nnunet import nnunet_folder
from .splits import NAMES, apply_split

# In small letters; in a folder they may have large ones.
IMAGES = ("images", "image", "imgs", "img", "jpegimages", "imagestr")
MASKS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentations", "segmentation", "seg",
    "segmentationclass", "ground_truth", "groundtruth", "gt", "labelstr",
)  # fmt: skip
KNOWN = "images/<id>.png with masks/<class>/<id>.png, or images/<id>.png with label maps masks/<id>.png"
ORDER = ("training", "validation", "test")


def read_folder(root: Path, names: Sequence[str] | None = None, ignore: int | None = 255, fold: int = 0) -> Folder:
    """The samples of a folder in one of the layouts above.

    Args:
        root: the folder, or a JSON file of COCO's or MONAI's kind.
        names: of the classes of label maps, that of value 0 first; None to count them.
        ignore: the value that label maps give to ignored pixels, or None.
        fold: which fold of a list of several is for validation.

    Raises:
        InputError: the layout is not recognised (the message says what is there and which layout is near), an image has
            no mask, or the label maps are not those of such classes.
    """
    if not root.is_dir() and not (root.suffix == ".json" and root.is_file()):
        raise InputError(f"{root} is not a folder")
    parts = file_list(root, ignore, fold) or (nnunet_folder(root, ignore) if root.is_dir() else None)
    if parts is None:
        outlined = coco_folder(root)
        if outlined:
            if names:
                raise InputError("--classes names the values of label maps: COCO's categories have names")
            return outlined
    parts = parts or (_folders(root, ignore) if root.is_dir() else None)
    if parts is None:
        raise InputError(_unrecognised(root))
    return folder_of(apply_split(root, parts, fold), names)


def _folders(root: Path, ignore: int | None = None) -> Parts | None:
    """Images and masks in folders, divided if folders for training and validation, or for testing, divide them."""
    found: dict[str, Pairs] = {}
    for part, choices in NAMES.items():
        for name in choices:
            pairs = _pairs(root / name) or _pairs(root, below=name)
            if pairs:
                found[part] = pairs.prefixed(name)
                break
    if "training" in found and len(found) > 1:
        divided: dict[str, Any] = {part: found[part] for part in ORDER if part in found}
        return Parts(**divided, ignore=ignore)
    whole = _pairs(root)
    return Parts(whole, ignore=ignore) if whole else None


def _named(root: Path, names: Sequence[str], below: str = "") -> Path | None:
    """The folder inside that has one of these names, the first in the list; below: a folder in it."""
    inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = {path.name.lower(): path / below for path in reversed(inside) if (path / below).is_dir()}
    return next((found[name] for name in names if name in found), None)


def _pairs(root: Path, below: str = "") -> Pairs | None:
    """Images with masks, in two folders or in one; None if there are none. below: a folder in both folders."""
    images, masks = _named(root, IMAGES, below), _named(root, MASKS, below)
    if images and masks:
        files = files_by_id(masks, all_endings())
        in_folders = _only_folders(masks, [path for path in files.values() if path.is_file()])
        if in_folders and not _only_folders(images, files_by_id(images, all_endings())):
            return class_folders(images, masks)
        if not files:
            return None
        found = find_images(images, all_endings())
        return Pairs(single_files(found), {"": by_image(files, found)}, masks)
    if below or images or masks or not root.is_dir():
        return None
    files = files_by_id(root, all_endings())
    kept = {key: path for key, path in files.items() if not key.endswith(MARKS)}
    masks_here = by_image(files, kept, marked=True)
    if not masks_here:  # archives of an image and its mask each
        kept = masks_here = {key: path for key, path in files.items() if holds_mask(path)}
    return Pairs(single_files(kept), {"": masks_here}, root) if kept and masks_here else None


def _only_folders(place: Path, files: Collection) -> bool:
    """Whether a folder holds folders, such as of classes, rather than the files that were found in it."""
    folders = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return bool(folders) and not files


def _unrecognised(root: Path) -> str:
    """What is in the folder, and which layout is near."""
    if root.is_file():
        return f'{root} is neither a list of files {{"training": [...]}} nor a file of COCO (docs/data.md)'
    inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path.name + "/" for path in inside if path.is_dir()]
    endings = Counter(
        ending_of(path, all_endings()) or path.suffix.lower() or path.name for path in inside if path.is_file()
    )
    seen = [*folders[:6], *(["..."] if len(folders) > 6 else [])]
    seen += [f"{count} file(s) {ending}" for ending, count in endings.most_common(3)]
    near = _nearest(root, inside, endings)
    return f"{root} has no layout that is known; it holds {', '.join(seen) or 'nothing'}; nearest: {near} (docs/data.md)"


def _has_images_and_masks(place: Path) -> bool:
    return bool(_named(place, IMAGES) and _named(place, MASKS))


def _nearest(root: Path, inside: Sequence[Path], endings: Counter) -> str:
    """Which layout would work with the least change."""
    images, masks = _named(root, IMAGES), _named(root, MASKS)
    if images and _only_folders(images, files_by_id(images, all_endings())):
        parts = f"{images.name}/train and {images.name}/val"
        return f"put the images into {images.name}/ itself, or into {parts}, and their masks likewise"
    if images:
        where = "labelsTr" if images.name == "imagesTr" else "masks"
        near = f"put the masks of {images.name}/<id>.png into {where}/<id>.png"
        return near + (f"; {masks.name}/ holds no image ({', '.join(all_endings())})" if masks else "")
    if masks:
        return f"put the images of {masks.name}/<id>.png into images/<id>.png"
    below = next((path for path in inside if path.is_dir() and _has_images_and_masks(path)), None)
    if below:
        return f"give {below}"
    if itk.is_series(root) or any(itk.is_series(path) for path in inside):
        return "put each series into images/<id>/ and its mask into masks/<id>.nii.gz"
    if any(ending in all_endings() for ending in endings):
        ending = next(ending for ending in endings if ending in all_endings())
        mark = ".png" if ending in (".jpg", ".jpeg") else ending
        return f"name the mask of <id>{ending} <id>_mask{mark}, or use the folders images/ and masks/"
    per_case = any(ending_of(file, volume_endings()) for path in inside if path.is_dir() for file in path.iterdir())
    if ".json" in endings or per_case:
        return 'list the files in dataset.json as {"training": [{"image": ..., "label": ...}]}'
    return KNOWN
