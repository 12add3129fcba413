"""nnU-Net's raw data: imagesTr/<id>_0000.nii.gz, _0001, ... with labelsTr/<id>.nii.gz and dataset.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import InputError, first_line
from ..class_names import folder_names
from ..file_formats import all_endings, channels_by_id, files_by_id, find_images, format_of
from ..pairs import Pairs, Parts, by_image


def nnunet_folder(root: Path, ignore: int | None) -> Parts | None:
    """Images with one file per channel, and the classes in dataset.json, if there is one; None for other folders.

    Raises:
        InputError: dataset.json is damaged, or an image lacks a channel.
    """
    if not ((root / "imagesTr").is_dir() and (root / "labelsTr").is_dir()):
        return None
    path = root / "dataset.json"
    content: Mapping[str, Any] = {}
    names: list[str] | None = None
    ignored, regions = ignore, None
    if path.exists():
        content = _read(path)
        regions = _regions(path, content)
        names, ignored = (None, None) if regions else _labels(path, content)
    channels = content.get("channel_names", content.get("modality"))
    wanted = list(channels.values()) if isinstance(channels, dict) else None
    training, count = _pairs(root, "Tr", wanted)
    test = _pairs(root, "Ts", wanted)[0] if (root / "labelsTs").is_dir() and (root / "imagesTs").is_dir() else None
    notes = (f"{count} channels ({', '.join(map(str, wanted or range(count)))})",) if count > 1 else ()
    return Parts(training, None, test, names, ignored, regions, notes, count)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no labels: it cannot be read as JSON ({first_line(error)})") from error
    return content if isinstance(content, dict) else {}


def _labels(path: Path, content: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """The names of the classes, that of 0 first, and the ignored value."""
    labels = content.get("labels")
    try:
        values = {name: int(value) for name, value in labels.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no labels such as {{'background': 0, 'a': 1}} ({first_line(error)})") from error
    ignored = values.pop("ignore", None)
    names = sorted(values, key=values.__getitem__)
    if [values[name] for name in names] != list(range(len(names))):
        raise InputError(f"{path} has the labels {values}: expected 0, 1, 2, ... without a gap")
    return folder_names(names, path), ignored


def _regions(path: Path, content: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """The values of each class if a class has several; without the background. None for classes of one value each."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not any(isinstance(value, list) for value in labels.values()):
        return None
    regions = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    if "ignore" in regions or not all(isinstance(value, int) for values in regions.values() for value in values):
        raise InputError(f"{path} has the regions {labels}: expected whole numbers, and no ignored value")
    kept = {name: values for name, values in regions.items() if values != [0]}
    return dict(zip(folder_names(kept, path), kept.values(), strict=True))


def _pairs(root: Path, part: str, channels: list[Any] | None) -> tuple[Pairs, int]:
    """The images of `imagesTr` or `imagesTs`, and how many files each has; 0 if they are called <id>."""
    folder, masks_at = root / f"images{part}", root / f"labels{part}"
    images = channels_by_id(find_images(folder, all_endings()))
    numbers = sorted({number for files in images.values() for number in files})
    in_colour = numbers == [0] and all(format_of(files[0]).images for files in images.values())
    if channels and numbers != [-1] and not in_colour:
        numbers = list(range(len(channels)))
    for key, files in images.items():
        for number in numbers:
            if number not in files:
                name = f" ({channels[number]})" if channels else ""
                other = next(iter(files.values()))
                raise InputError(f"{folder}: image {key} has no channel _{max(number, 0):04d}{name}; there is {other.name}")
        extra = sorted(set(files) - set(numbers))
        if extra:
            raise InputError(f"{files[extra[0]]} is a channel that dataset.json does not name: it has {len(numbers)}")
    masks = by_image(files_by_id(masks_at, all_endings()), images)
    paths = {key: tuple(files[number] for number in numbers) for key, files in images.items()}
    return Pairs(paths, {"": masks}, masks_at), 0 if numbers == [-1] else len(numbers)
