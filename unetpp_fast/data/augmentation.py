"""Random changes of training patches by the transforms of MONAI, in 2D and 3D.

A list of transforms has one entry per transform: its name, as in MONAI's documentation, and its settings. Those that move
pixels (`RandAffine`, `Rand2DElastic`, `RandZoom`, ...) come first and move image and masks alike, masks by their nearest
pixel; the others (`RandGaussianNoise`, `RandAdjustContrast`, ...) change the image alone.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import InputError, first_line
from ..common.extras import need
from .geometry import sides_of

Spec = list[list]  # [name, settings], ...
EXTRA = "augment"
MARGIN = 3 / 8  # of the longest side: what is read around a patch, so that turning and shrinking brings in no emptiness
SIZED = ("RandAffine", "Rand2DElastic", "Rand3DElastic")  # can return the middle of what they read
OF_THE_IMAGE = ("RandSimulateLowResolution",)  # MONAI counts it among those that move pixels
_INTENSITIES = (
    ("RandGaussianSmooth", {"prob": 0.15, "sigma_x": [0.5, 1.0], "sigma_y": [0.5, 1.0], "sigma_z": [0.5, 1.0]}),
    ("RandShiftIntensity", {"prob": 0.3, "offsets": 0.3}),
    ("RandScaleIntensity", {"prob": 0.3, "factors": 0.3}),
    ("RandAdjustContrast", {"prob": 0.15, "gamma": [0.7, 1.5], "retain_stats": True}),
    ("RandGaussianNoise", {"prob": 0.15, "std": 0.1}),
)
_TURN = {"prob": 0.7, "rotate_range": [0.5], "scale_range": [[-0.25, 0.25]] * 2, "magnitude_range": [0, 3], "spacing": 24}
_TURN_3D = {
    "prob": 0.5, "rotate_range": [0.3] * 3, "scale_range": [[-0.25, 0.25]] * 3, "magnitude_range": [0, 300],
    "sigma_range": [5, 8],
}  # fmt: skip
STRONG: dict[int, Spec] = {  # by the number of spatial axes; flips and 90-degree turns come on top
    2: [["Rand2DElastic", _TURN], *map(list, _INTENSITIES)],
    3: [["Rand3DElastic", _TURN_3D], *map(list, _INTENSITIES)],
}


class Augmentation:
    """Transforms of a patch, chosen by a seed alone.

    Args:
        spec: names and settings.
        spatial_dims: 2 or 3.
        patch: side in pixels, of every axis or one per axis.

    Raises:
        InputError: MONAI is missing, or a transform is unknown or does not take its settings.
    """

    def __init__(self, spec: Spec, spatial_dims: int, patch: int | Sequence[int]):
        need("monai", EXTRA)
        self.spec, self.sides = spec, sides_of(patch, spatial_dims)
        kinds = [_find(name, spatial_dims) for name, _ in spec]
        movers = [index for index, (_, moves) in enumerate(kinds) if moves]
        self.resamples = any("mode" in inspect.signature(kinds[index][0]).parameters for index in movers)
        self.margin = -int(-MARGIN * max(self.sides) // 1) if self.resamples else 0
        small = (4 if self.resamples else 0) + 12
        trial = torch.rand(1, *[small] * spatial_dims, generator=torch.Generator().manual_seed(0))
        self.moving, self.colouring = [], []
        for index, ((name, settings), (kind, moves)) in enumerate(zip(spec, kinds, strict=True)):
            given = _settings(name, kind, moves, settings, spatial_dims)
            sized = name in SIZED and index == movers[-1]
            extra = {"spatial_size": self.sides} if sized else {}
            try:
                transform = kind(**given, **extra)
                content = {"image": trial, "mask": trial}
                always = {"prob": 1.0} if "prob" in inspect.signature(kind).parameters else {}
                tried = kind(**{**given, **always})(content)
            except Exception as error:  # MONAI raises many kinds for wrong settings
                raise InputError(f"the transform {name} cannot be used with {settings}: {first_line(error)}") from error
            if tried["image"].shape != trial.shape or tried["mask"].shape != trial.shape:
                raise InputError(f"the transform {name} changes the size of an image: leave it out")
            (self.moving if moves else self.colouring).append(transform)

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """A changed patch: image float32 `[C, *patch]` and mask bool `[classes, *patch]`.

        Args:
            image: float32 `[C, *S]`, along each axis as long as the patch with a margin on both sides.
            mask: of that size; pixels that come from outside of it have no class.
            seed: integers that determine all choices.
        """
        seeds = np.random.SeedSequence(tuple(seed)).generate_state(len(self.moving) + len(self.colouring)).tolist()
        content = {"image": torch.tensor(image), "mask": torch.tensor(mask, dtype=torch.float32)}  # copies
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # smoothing could sum in another order with another number
        try:
            for transform in self.moving:
                content = transform.set_random_state(seed=seeds.pop())(content)
            content = {key: self._middle(value) for key, value in content.items()}
            for transform in self.colouring:
                content = transform.set_random_state(seed=seeds.pop())(content)
        finally:
            torch.set_num_threads(threads)
        return np.asarray(content["image"], np.float32), np.asarray(content["mask"]) > 0.5

    def _middle(self, values: torch.Tensor) -> torch.Tensor:
        starts = [(size - side) // 2 for size, side in zip(values.shape[1:], self.sides, strict=True)]
        return values[(slice(None), *(slice(start, start + side) for start, side in zip(starts, self.sides, strict=True)))]


def read_spec(path: Path) -> Spec:
    """The list of transforms in a YAML or JSON file: `- RandFlip` or `- RandAffine: {prob: 0.5, rotate_range: [0.5]}`.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    yaml = need("yaml", "commands")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--augment: {path} cannot be read ({error.strerror}): give none, light, strong or a file"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML ({first_line(error)})") from error
    entries = [{entry: None} if isinstance(entry, str) else entry for entry in content] if isinstance(content, list) else []
    if not entries or not all(isinstance(entry, dict) and len(entry) == 1 for entry in entries):
        raise InputError(f"{path} must be a list of transforms such as '- RandAffine: {{prob: 0.5, rotate_range: [0.5]}}'")
    spec = [[str(name), settings or {}] for entry in entries for name, settings in entry.items()]
    for name, settings in spec:
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise InputError(f"{path}: the settings of {name} must be names with values, not {settings!r}")
    return spec


def _find(name: str, spatial_dims: int) -> tuple[Any, bool]:
    """The class of a transform for dictionaries, and whether it moves pixels."""
    other = {2: "3D", 3: "2D"}[spatial_dims]
    if other in name:
        raise InputError(f"the transform {name} is for {other} images: the data is {spatial_dims}D")
    known = {}
    for part in ("intensity", "spatial"):
        module = need(f"monai.transforms.{part}.dictionary", EXTRA)
        for key, kind in vars(module).items():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and key.startswith("Rand") and key.endswith("d"):
                known[key[:-1]] = kind, part == "spatial" and key[:-1] not in OF_THE_IMAGE
    if name not in known:
        alike = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise InputError(f"there is no random transform {name!r} of MONAI's; there are {', '.join(alike)}")
    return known[name]


def _settings(name: str, kind: Any, moves: bool, settings: dict[str, Any], spatial_dims: int) -> dict[str, Any]:
    """The arguments of a transform."""
    takes = inspect.signature(kind).parameters
    own = [key for key in ("keys", "mode", "spatial_size") if key in settings and (moves or key == "keys")]
    if own:
        raise InputError(f"the transform {name} gets its {own[0]} from the training: leave it out")
    given = {"keys": ["image", "mask"] if moves else ["image"], **settings}
    if moves and "mode" in takes:
        sampled = "Grid" in type(takes["mode"].default).__name__
        given["mode"] = ["bilinear" if sampled or spatial_dims == 2 else "trilinear", "nearest"]
        if sampled:  # beyond the image there is no class
            given.setdefault("padding_mode", "zeros")
    return given
