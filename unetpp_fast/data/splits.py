"""Files that say which images are for training, validation and testing.

train.txt, val.txt, test.txt   an image per line: its id, or its file; in the folder, `ImageSets/Segmentation` or `splits`
splits_final.json              of nnU-Net: a list of {"train": [...], "val": [...]}, one for each fold
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.errors import InputError, first_line
from .file_formats import id_of
from .folds import load_folds
from .pairs import Parts

PLACES = ("", "ImageSets/Segmentation", "splits", "split")
NAMES = {"training": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
FOLDS = "splits_final.json"
Listed = dict[str, list[str]]  # by part


def apply_split(root: Path, parts: Parts, fold: int = 0) -> Parts:
    """The images divided as a file in the folder says; images that it does not name are left out.

    Parts that folders divide stay as they are, and so do those without such a file.

    Raises:
        InputError: the file is damaged, or names an image that does not exist, or one twice.
    """
    if parts.validation:
        return parts
    found = _text_files(root) or _folds(root / FOLDS, fold)
    if not found:
        return parts
    what, listed, where = found
    whole = parts.training
    if parts.test:
        listed.pop("test", None)
    ids = {part: [_id(name, whole.images, where(part)) for name in names] for part, names in listed.items()}
    _check_apart(ids, where)
    divided: dict[str, Any] = {part: whole.only(chosen) for part, chosen in ids.items()}
    left = len(whole.images) - sum(map(len, ids.values()))
    notes = (f"split by {what}", *([f"{left} left out"] if left else []))
    return replace(parts, **divided, notes=(*parts.notes, *notes), has_folds=what.startswith(FOLDS))


def _text_files(root: Path) -> tuple[str, Listed, Callable[[str], Path]] | None:
    for place in PLACES:
        folder = root / place
        paths = {part: path for part, names in NAMES.items() for name in names if (path := folder / f"{name}.txt").is_file()}
        if "training" in paths:
            listed = {part: _lines(path) for part, path in paths.items()}
            return " and ".join(path.name for path in paths.values()), listed, paths.__getitem__
    return None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a list of images ({first_line(error)})") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"{path} names no image: write one per line, or remove it")
    return names


def _folds(path: Path, fold: int) -> tuple[str, Listed, Callable[[str], Path]] | None:
    if not path.is_file():
        return None
    listed = [{"training": one["train"], "validation": one["val"]} for one in load_folds(path)]
    if not 0 <= fold < len(listed):
        raise InputError(f"{path} holds the folds 0 to {len(listed) - 1}: there is no fold {fold}")
    if not listed[fold]["training"] or not listed[fold]["validation"]:
        raise InputError(f"{path} has no images for training or for validation in fold {fold}")
    return f"{path.name}, fold {fold} of {len(listed)}", listed[fold], lambda part: path


def _id(name: str, known: Iterable[str], path: Path) -> str:
    """The image that a line names: by its id, by a file, or by the first of several words."""
    for text in (name, *name.split()[:1]):
        for key in (text, Path(text).name, id_of(Path(text))):
            if key in known:
                return key
    raise InputError(f"{path} names {name!r}, which is no image of the folder; ids are such as {next(iter(known))!r}")


def _check_apart(ids: Mapping[str, Sequence[str]], where: Callable[[str], Path]) -> None:
    """Raises InputError if an image is named twice."""
    seen: dict[str, str] = {}
    for part, names in ids.items():
        for name in names:
            if name in seen:
                other = f" and for {part}" if seen[name] != part else ""
                raise InputError(f"{where(part)} names {name!r} twice, for {seen[name]}{other}: an image has one place")
            seen[name] = part
