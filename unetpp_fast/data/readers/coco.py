"""COCO's JSON: objects as polygons or run lengths; the objects of a category are the mask of its class.

Categories are classes in the order of their numbers; those without an object are left out. Masks of different classes may
overlap. A crowd counts like an object. Images without an object are background.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError, first_line
from ...common.extras import need
from ...models.normalisation import Normalisation
from ..class_names import folder_names
from ..images import STANDARD, read_normalised, read_values
from ..pairs import Folder

KEYS = ("images", "annotations", "categories")
PARTS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Outlined:
    """An object: the index of its class, and its polygons or run lengths as in the file. number: of the annotation."""

    number: Any
    label: int
    shape: Any


@dataclass(frozen=True)
class CocoSample:
    """An image and the objects on it; masks are drawn when needed. size: height and width in the file `source`."""

    name: str
    image: Path
    source: Path
    size: tuple[int, int]
    objects: tuple[Outlined, ...]
    classes: int
    normalisation: Normalisation = field(default=STANDARD, kw_only=True)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image, float32 `[C, H, W]`, and masks, bool `[classes, H, W]`.

        Raises:
            InputError: the image cannot be read or has another size than in the file, or an outline is damaged.
        """
        image = read_normalised(self.image, self.normalisation)
        if image.shape[1:] != self.size:
            have, want = ("x".join(map(str, size)) for size in (image.shape[1:], self.size))
            raise InputError(f"{self.image} is {have} pixels, upright, but {self.source} says {want}: replace the image")
        masks = np.zeros((self.classes, *self.size), bool)
        for outlined in self.objects:
            masks[outlined.label] |= self._drawn(outlined)
        return image, masks

    def values(self) -> np.ndarray:
        """The image before it is normalised, float64 `[C, H, W]`."""
        return read_values(self.image)

    def _drawn(self, outlined: Outlined) -> np.ndarray:
        drawing, shape = need("pycocotools.mask", "coco"), outlined.shape
        where = f"{self.source}: the object {outlined.number} of {self.name}"
        try:
            if isinstance(shape, dict):
                if tuple(shape["size"]) != self.size:
                    raise InputError(f"{where} has run lengths of {shape['size']} for an image of {list(self.size)}")
                if isinstance(shape["counts"], list) and sum(shape["counts"]) != self.size[0] * self.size[1]:
                    raise InputError(f"{where} has run lengths of {sum(shape['counts'])} pixels: the file is damaged")
                packed = shape if isinstance(shape["counts"], str) else drawing.frPyObjects(shape, *self.size)
                return drawing.decode(packed).astype(bool)
            polygons = [np.asarray(points, float).tolist() for points in shape]
            if not polygons or any(len(points) < 6 or len(points) % 2 for points in polygons):
                raise InputError(f"{where} has no outline of 3 points or more: boxes and points are no masks")
            return drawing.decode(drawing.merge(drawing.frPyObjects(polygons, *self.size))).astype(bool)
        except InputError:
            raise
        except Exception as error:  # a damaged outline can make the library fail in any way
            raise InputError(f"{where} cannot be drawn ({first_line(error)})") from error


def coco_folder(place: Path) -> Folder | None:
    """The images that the JSON `place`, or JSONs in the folder `place`, outline; None if there are none.

    In a folder the files lie in it, in `annotations` or beside the images of `train`, `val` and `test`. Their names or
    folders say which part they are; a single file is split.

    Raises:
        InputError: a file is damaged, names unknown images or categories, or its images are missing.
    """
    sources = _sources(place)
    if not sources:
        return None
    need("pycocotools.mask", "coco")
    parts = _by_part(place, sources)
    used = [entry["category_id"] for content in sources.values() for entry in content["annotations"]]
    classes = _classes(parts["training"], sources, set(used))
    root = place if place.is_dir() else place.parent
    made = {part: _samples(root, path, sources[path], classes, part) for part, path in parts.items()}
    names = [name for name, _ in classes.values()]
    count = sum(map(len, made.values()))
    found = f"found {count} images with outlines of {len(names)} class{'es' if len(names) != 1 else ''} ({', '.join(names)})"
    found += f", {len(made['validation'])} of them for validation" if "validation" in made else ""
    found += f", {len(made['test'])} for testing" if "test" in made else ""
    return Folder(made["training"], names, found, validation=made.get("validation"), test=made.get("test"))


def _sources(place: Path) -> dict[Path, Mapping[str, Any]]:
    """The COCO files: if some are called instances_..., only these."""
    patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    paths = [place] if place.suffix == ".json" else sorted({path for text in patterns for path in place.glob(text)})
    named = [path for path in paths if path.name.startswith("instances")]
    found: dict[Path, Mapping[str, Any]] = {}
    for path in named or paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if path == place or named:
                raise InputError(f"{path} cannot be read as JSON ({first_line(error)}): download it again") from error
            continue
        if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in KEYS):
            found[path] = content
    return found


def _by_part(place: Path, sources: Mapping[Path, Any]) -> dict[str, Path]:
    if len(sources) == 1:
        return {"training": next(iter(sources))}
    parts: dict[str, Path] = {}
    for path in sources:
        text = f"{path.parent.name if path.parent != place else ''} {path.name}".lower()
        part = next((part for word, part in PARTS.items() if word in text), None)
        if part is None or part in parts:
            listed = ", ".join(str(one.relative_to(place)) for one in sources)
            raise InputError(
                f"{place} holds the COCO files {listed}: give one with --data, or name them by train, val, test"
            )
        parts[part] = path
    if "training" not in parts:
        raise InputError(f"{place} holds no COCO file for training, only {', '.join(map(str, sources))}")
    return parts


def _classes(first: Path, sources: Mapping[Path, Any], used: set) -> dict[Any, tuple[str, int]]:
    """Name and index of each category that has an object, by its number in the files."""
    names: dict[Any, str] = {}
    for path, content in sources.items():
        for category in content["categories"]:
            try:
                key, name = category["id"], str(category["name"])
            except (KeyError, TypeError) as error:
                raise InputError(f"{path} has a category without id or name: {category!r}") from error
            if names.setdefault(key, name) != name:
                raise InputError(f"{path} calls the category {key} {name!r}, another file calls it {names[key]!r}")
    unknown = sorted(used - set(names), key=str)
    if unknown:
        raise InputError(f"{first} has objects of the category {unknown[0]}, which it does not list")
    keys = [key for key in sorted(names) if key in used]
    if not keys:
        raise InputError(f"{first} outlines no object: there is nothing to learn")
    return {
        key: (name, index)
        for index, (key, name) in enumerate(zip(keys, folder_names((names[key] for key in keys), first), strict=True))
    }


def _samples(
    root: Path, path: Path, content: Mapping[str, Any], classes: Mapping[Any, tuple[str, int]], part: str
) -> list[CocoSample]:
    objects: dict[Any, list[Outlined]] = {}
    try:
        for image in content["images"]:
            objects[image["id"]] = []
        for entry in content["annotations"]:
            if entry["image_id"] not in objects:
                raise InputError(
                    f"{path}: the object {entry.get('id')} is on image {entry['image_id']}, which is not listed"
                )
            label = classes[entry["category_id"]][1]
            objects[entry["image_id"]].append(Outlined(entry.get("id"), label, entry.get("segmentation") or []))
        listed = [
            (image["id"], image["file_name"], int(image["height"]), int(image["width"])) for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no complete COCO file: it lacks {error}") from error
    folder = _image_folder(root, path, [name for _, name, *_ in listed], part)
    return [
        CocoSample(str(Path(name).with_suffix("")), folder / name, path, (height, width), tuple(objects[key]), len(classes))
        for key, name, height, width in listed
    ]


def _image_folder(root: Path, path: Path, names: Sequence[str], part: str) -> Path:
    """Where the images are: beside the file, in the root, or in a folder of it, preferably one called like the part.

    Raises:
        InputError: the file lists no image, or one that is not there.
    """
    if not names:
        raise InputError(f"{path} lists no image")
    below = [folder for pattern in ("*", "*/*") for folder in sorted(root.glob(pattern)) if folder.is_dir()]
    places = [path.parent, path.parent / "images", root, root / "images", *below]
    word = next(word for word, name in PARTS.items() if name == part)
    folder = max(places, key=lambda place: (sum((place / name).is_file() for name in names), word in place.name))
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{path} lists the image {missing}, which is not in {folder}")
    return folder
