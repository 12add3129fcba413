"""Lists of files as the Medical Segmentation Decathlon and MONAI keep them: {"training": [{"image": ..., "label": ...}]}."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import InputError, first_line
from ..class_names import folder_names
from ..file_formats import all_endings, channels_by_id, files_by_id, id_of
from ..pairs import Pairs, Parts

PARTS = {"training": "training", "validation": "validation", "test": "test", "testing": "test"}


def file_list(place: Path, ignore: int | None, fold: int = 0) -> Parts | None:
    """The files that the JSON `place`, or a JSON in the folder `place`, lists; None if there is no such list.

    "image" may be a list of files, one per channel. Entries with a "fold" are for validation if it is `fold`. Entries of
    "test" without a label are left out.

    Raises:
        InputError: the list is damaged, or a file that it names does not exist.
    """
    path, content = _find(place)
    if path is None:
        return None
    ids = _ids([entry for part in PARTS for entry in content.get(part) or []])
    parts: dict[str, dict[str, tuple[tuple[Path, ...], Path]]] = {}
    for key, part in PARTS.items():
        for entry in content.get(key) or []:
            if part == "test" and not (isinstance(entry, dict) and "label" in entry):
                continue
            if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
                raise InputError(f'{path} has the entry {entry!r} in "{key}": expected {{"image": ..., "label": ...}}')
            wanted = "validation" if part == "training" and entry.get("fold") == fold else part
            files = tuple(file for name in _texts(path, entry["image"]) for file in _image_files(path, name))
            label = _file(path, *_texts(path, entry["label"])[:1])
            parts.setdefault(wanted, {})[ids[_texts(path, entry["label"])[0]]] = files, label
    folds = sorted({entry["fold"] for entry in content["training"] if "fold" in entry})
    if folds and fold not in folds:
        raise InputError(f"{path} has the folds {', '.join(map(str, folds))}: there is no fold {fold}")
    made: dict[str, Any] = {part: _pairs(path, entries) for part, entries in parts.items()}
    if "training" not in made:
        raise InputError(f"{path} lists no image for training outside fold {fold}")
    names = _names(path, content.get("labels"))
    note = f"listed in {path.name}" + (f", fold {fold}" if folds else "")
    return Parts(**made, names=names, ignore=ignore, notes=(note,), has_folds=bool(folds))


def _find(place: Path) -> tuple[Path | None, Mapping[str, Any]]:
    for path in [place] if place.suffix == ".json" else sorted(place.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if path == place:
                raise InputError(f"{path} cannot be read as JSON ({first_line(error)}): download it again") from error
            continue
        if isinstance(content, dict) and isinstance(content.get("training"), list):
            return path, content
    return None, {}


def _texts(path: Path, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) for text in values):
        raise InputError(f"{path} has {value!r} where the name of a file should be")
    return values


def _file(path: Path, name: str) -> Path:
    file = path.parent / name
    if not file.exists():
        raise InputError(f"{path} names {name}, which does not exist: {file}")
    return file


def _image_files(path: Path, name: str) -> list[Path]:
    """The file of that name, or as in nnU-Net's first version the channels `<id>_0000`, ... that it stands for."""
    file = path.parent / name
    if file.exists() or not file.parent.is_dir():
        return [_file(path, name)]
    channels = channels_by_id(files_by_id(file.parent, all_endings())).get(id_of(file), {})
    return [channels[number] for number in sorted(channels)] or [_file(path, name)]


def _ids(entries: list[Any]) -> dict[str, str]:
    """A short name for each label: that of its file, or its whole path where files have the same name."""
    labels = [entry["label"] for entry in entries if isinstance(entry, dict) and "label" in entry]
    texts = [label[0] if isinstance(label, list) and label else label for label in labels]
    texts = [text for text in texts if isinstance(text, str)]
    plain = {text: str(Path(text).with_name(id_of(Path(text)))) for text in texts}
    count = Counter(Path(name).name for name in plain.values())
    return {text: Path(name).name if count[Path(name).name] == 1 else name for text, name in plain.items()}


def _pairs(path: Path, entries: Mapping[str, tuple[tuple[Path, ...], Path]]) -> Pairs:
    counts = {len(files): files[0] for files, _ in entries.values()}
    if len(counts) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise InputError(f"{path} lists {one} file(s) of {first.name} but {other} of {second.name}: a channel is missing")
    images = {key: files for key, (files, _) in entries.items()}
    return Pairs(images, {"": {key: label for key, (_, label) in entries.items()}}, path.parent)


def _names(path: Path, labels: Any) -> list[str] | None:
    """The names of the classes in {"0": "background", ...}, or {"background": 0, ...}; None if there are none."""
    if not labels:
        return None
    try:
        by_value = {int(value): name for value, name in labels.items()} if _is_numbered(labels) else None
        by_value = by_value or {int(value): name for name, value in labels.items()}
        names = [by_value[value] for value in range(len(by_value))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'{path} has the labels {labels!r}: expected {{"0": "background", "1": ...}} without a gap'
        ) from error
    return folder_names(names, path)


def _is_numbered(labels: Mapping[str, Any]) -> bool:
    return all(str(key).isdecimal() for key in labels)
