"""Images paired with their mask files, and the samples that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import InputError
from .file_formats import all_endings, files_by_id, find_images, format_of
from .inputs import read_drawn_mask
from .label_maps import LabelSample, RegionSample, Seen, check_regions, is_binary, label_classes, palette_of, survey
from .samples import Dataset, Sample

MARKS = ("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "-mask")


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    samples: of training; with `validation` None to be split.
    found: one line for the user.
    exclusive: whether the classes exclude each other.
    palette: the colours of exclusive classes.
    ignore: the value of ignored pixels.
    test: samples that are for neither training nor validation.
    spatial_dims: 2 for images, 3 for volumes.
    channel_files: the number of files of an image if they are called `<id>_0000`, `<id>_0001`, ...; 0 for one file `<id>`.
    has_folds: whether the data come with several splits, of which this is one.
    """

    samples: list
    classes: list[str]
    found: str
    exclusive: bool = False
    palette: list[list[int]] | None = None
    ignore: int | None = None
    validation: list | None = None
    test: list | None = None
    spatial_dims: int = 2
    channel_files: int = 0
    has_folds: bool = False


@dataclass(frozen=True)
class Pairs:
    """Images, each with one mask file, or with one per class.

    images: the files of each image by id, one or one per channel.
    masks: mask files by class and id; the class of label maps, and of masks without a folder for their class, is "".
    masks_at: where they are, for messages.
    """

    images: dict[str, tuple[Path, ...]]
    masks: dict[str, dict[str, Path]]
    masks_at: Path

    @property
    def has_class_folders(self) -> bool:
        return "" not in self.masks

    def only(self, ids: Iterable[str]) -> Pairs:
        """Those of these images."""
        return replace(self, images={key: self.images[key] for key in ids})

    def prefixed(self, name: str) -> Pairs:
        """With `name/` before every id."""
        images = {f"{name}/{key}": files for key, files in self.images.items()}
        masks = {label: {f"{name}/{key}": path for key, path in files.items()} for label, files in self.masks.items()}
        return replace(self, images=images, masks=masks)

    def check_complete(self) -> None:
        """Raises InputError if an image has no mask."""
        for label, files in self.masks.items():
            missing = sorted(set(self.images) - set(files))
            if not missing:
                continue
            image = self.images[missing[0]][0]
            if label:
                ending = ".png" if format_of(image).images else "".join(image.suffixes[-2:])
                wanted = self.masks_at / label / f"{missing[0].rpartition('/')[2]}{ending}"
                raise InputError(f"image {image} has no mask {wanted} ({len(missing)} such image(s))")
            text = f"image {image} has no mask in {self.masks_at} ({len(missing)} such image(s))"
            others = files_by_id(self.masks_at, all_endings()) if len(missing) == len(self.images) else {}
            if others:
                text += f": call it like the image, or <id>_mask; there is {next(iter(others.values())).name}"
            raise InputError(text)

    def samples(self) -> list[Sample]:
        """With masks, one per class."""
        masks = list(self.masks.values())
        return [
            Sample(key, first, tuple(files[key] for files in masks), channels=tuple(rest))
            for key, (first, *rest) in self.images.items()
        ]

    def label_samples(self, classes: int, ignore: int | None) -> list[LabelSample]:
        """With label maps."""
        return [
            LabelSample(key, first, self.masks[""][key], classes, ignore, channels=tuple(rest))
            for key, (first, *rest) in self.images.items()
        ]


@dataclass(frozen=True)
class Parts:
    """The images of a folder that is recognised: all, to be split, or those of training with others beside.

    names: of the classes of label maps, if files of the layout tell. ignore: likewise, the value of ignored pixels.
    regions: of label maps whose classes overlap, the values of each class.
    notes: what else the line for the user says. channel_files, has_folds: as in `Folder`.
    """

    training: Pairs
    validation: Pairs | None = None
    test: Pairs | None = None
    names: Sequence[str] | None = None
    ignore: int | None = None
    regions: Mapping[str, Sequence[int]] | None = None
    notes: tuple[str, ...] = ()
    channel_files: int = 0
    has_folds: bool = False

    def all(self) -> list[Pairs]:
        """The parts that exist."""
        return [part for part in (self.training, self.validation, self.test) if part]


def folder_of(parts: Parts, names: Sequence[str] | None = None) -> Folder:
    """The samples of the images that were found.

    Args:
        parts: the images.
        names: of the classes of label maps, as the user gives them.

    Raises:
        InputError: an image has no mask, or the files are not label maps of such classes or masks.
    """
    for part in parts.all():
        part.check_complete()
    if parts.training.has_class_folders:
        if names:
            raise InputError(f"--classes names the values of label maps; here those of {parts.training.masks_at} do")
        return _of_class_folders(parts)
    seen = survey([part.masks[""][key] for part in parts.all() for key in part.images])
    if parts.regions and not names:
        return _of_regions(parts, parts.regions, seen)
    given, ignore = names or parts.names, parts.ignore
    if given is None and is_binary(seen):
        return _folder(
            parts, [part.samples() for part in parts.all()], ["foreground"], seen.spatial_dims, "masks of 1 class"
        )
    classes = label_classes(seen, parts.training.masks_at, given, ignore)
    made = [part.label_samples(len(classes), ignore) for part in parts.all()]
    what = f"label maps of {_count(classes)}"
    ignored = (f"{ignore} is ignored",) if ignore in seen.values else ()
    folder = _folder(parts, made, classes, seen.spatial_dims, what, ignored)
    return replace(folder, exclusive=True, palette=palette_of(seen, len(classes)), ignore=ignore)


def _of_class_folders(parts: Parts) -> Folder:
    classes = list(parts.training.masks)
    for part in parts.all()[1:]:
        if list(part.masks) != classes:
            have, want = ", ".join(part.masks), ", ".join(classes)
            raise InputError(f"{part.masks_at} holds the classes {have}, {parts.training.masks_at} {want}: use the same")
    first = next(iter(next(iter(parts.training.masks.values())).values()))
    dims = read_drawn_mask(first).values.ndim
    made = [part.samples() for part in parts.all()]
    return _folder(parts, made, classes, dims, f"masks of {_count(classes)}")


def _of_regions(parts: Parts, regions: Mapping[str, Sequence[int]], seen: Seen) -> Folder:
    check_regions(seen, parts.training.masks_at, regions)
    values = tuple(tuple(numbers) for numbers in regions.values())
    made = [
        [
            RegionSample(key, first, part.masks[""][key], len(values), None, channels=tuple(rest), regions=values)
            for key, (first, *rest) in part.images.items()
        ]
        for part in parts.all()
    ]
    what = f"label maps of {len(regions)} regions that may overlap ({', '.join(regions)})"
    return _folder(parts, made, list(regions), seen.spatial_dims, what)


def _folder(
    parts: Parts, made: list[list], classes: list[str], dims: int, what: str, ignored: tuple[str, ...] = ()
) -> Folder:
    count = sum(len(part) for part in made)
    notes = [f"found {count} {'volume' if dims == 3 else 'image'}{'s' if count != 1 else ''} with {what}"]
    left = iter(made[1:])
    validation, test = (next(left) if part else None for part in (parts.validation, parts.test))
    notes += [f"{len(validation)} of them for validation"] if validation is not None else []
    notes += [f"{len(test)} for testing"] if test is not None else []
    found = ", ".join([*notes, *parts.notes, *ignored])
    return Folder(
        made[0], classes, found, validation=validation, test=test, spatial_dims=dims,
        channel_files=parts.channel_files, has_folds=parts.has_folds,
    )  # fmt: skip


def _count(classes: Sequence[str]) -> str:
    return f"{len(classes)} class{'es' if len(classes) != 1 else ''} ({', '.join(classes)})"


def single_files(images: dict[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Images of one file each, as `Pairs` takes them."""
    return {key: (path,) for key, path in images.items()}


def by_image(masks: dict[str, Path], images: Iterable[str], marked: bool = False) -> dict[str, Path]:
    """The mask files by the id of their image: the same name, or with one of `MARKS` at its end (`marked`: only these)."""
    known = set(images)
    by_id = {} if marked else {key: path for key, path in masks.items() if key in known}
    for key, path in masks.items():
        for mark in MARKS:
            if key.endswith(mark) and key[: -len(mark)] in known:
                by_id.setdefault(key[: -len(mark)], path)
    return by_id


def class_folders(pictures: Path, folder: Path) -> Pairs | None:
    """`pictures/<id>.png` with `folder/<class>/<id>.png`; None if the folder holds no folders."""
    inside = folder.iterdir() if folder.is_dir() else []
    classes = sorted(path.name for path in inside if path.is_dir() and not path.name.startswith("."))
    if not classes:
        return None
    images = find_images(pictures, all_endings())
    masks = {name: files_by_id(folder / name, all_endings()) for name in classes}
    return Pairs(single_files(images), masks, folder)


def find_samples(root: Path) -> Dataset:
    """Every image with its masks in `images/<id>.png` and `masks/<class>/<id>.png`, sorted by id, and the classes' names.

    Raises:
        InputError: a folder is missing or empty, or an image has no mask.
    """
    pictures, folder = root / "images", root / "masks"
    if not pictures.is_dir():
        raise InputError(f"{pictures} is not a folder: expected {pictures}/<id>.png and {folder}/<class>/<id>.png")
    pairs = class_folders(pictures, folder)
    if pairs is None:
        raise InputError(f"{folder} holds no folder of masks: expected {folder}/<class>/<id>.png, e.g. {folder}/0/")
    pairs.check_complete()
    return pairs.samples(), list(pairs.masks)
