"""An image and what a model finds in it: read in any format, predicted head by head and member by member, drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..architecture.precision import autocast
from ..common.errors import InputError, first_line
from ..data import prediction_files
from ..data.images import STANDARD
from ..data.resampling import resampled
from ..experiments import pictures
from ..models.tiled_prediction import predict_tiled
from .models import Model

MODES = ("fast", "accurate")
WHOLE_PIXELS = 2048**2  # of an image or volume up to which it is predicted in one piece
MEMORY, TILE = "2G", 512  # for larger ones; the tile of networks over an encoder
SHOWN = 1400  # pixels of the longer side of a drawing
TWICE_MS = 20000.0  # a pass that took less is timed a second time: the first of a size also chooses kernels
OTHER_CHANNELS = {1: 3, 3: 1}


@dataclass
class Opened:
    """A file that was read for a model, and the predictions of it so far.

    note: what was done to its channels. times: milliseconds of each member, by (mode, level). kept: the mean of the members'
    probabilities, by (mode, level, image), and apart: how far they lie apart.
    """

    model: Model
    name: str
    source: prediction_files.Source
    note: str = ""
    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    kept: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)
    apart: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    @property
    def planes(self) -> int:
        """The number of planes to look at; 1 for an image."""
        return self.source.shape[self._axis] if len(self.source.shape) == 3 else 1

    @property
    def _axis(self) -> int:
        return self.source.axes.replace("C", "").index("Z") if "Z" in self.source.axes else 0

    def _part(self, plane: int) -> int:
        """Which of the source's images holds a plane: a volume is one image, a stack has one a plane."""
        return plane if self.source.is_stack else 0

    def probabilities(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """float32 `[classes, H, W]` of the plane, the mean of the members; computed once, and timed.

        Raises:
            InputError: the image does not fit the model, or the memory.
        """
        key = (mode, level, self._part(plane))
        if key not in self.kept:
            try:
                self._predict(key)
            except InputError as error:
                raise _named(error, self.source.stored.path, self.name) from error
        found = self.kept[key]
        return found if found.ndim == 3 else found[:, plane]

    def disagreement(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """float32 `[H, W]`: the largest probability of a member less the smallest, of the class where that is most.

        Raises:
            InputError: as `probabilities`.
        """
        self.probabilities(mode, level, plane)
        found = self.apart[mode, level, self._part(plane)]
        return found if found.ndim == 2 else found[plane]

    def _predict(self, key: tuple[str, int, int]) -> None:
        """Keeps the mean of the members' probabilities, `[classes, *S]`, how far they lie apart, `[*S]`, and the times."""
        mode, level, part = key
        values = self.source.images()[part]
        image: Any = prediction_files.Prepared(self.source, values, self.model.network.normalisation or STANDARD)
        given, size = values.shape[1:], self.source.size_at(self.model.network.spacing)
        image = image if size == given else resampled(image, size)[None]
        whole = int(np.prod(size)) <= WHOLE_PIXELS
        ready = torch.from_numpy(image[(0, ...)])[None].to(self.model.device) if whole else None
        (_, first), *others = self.model.members
        options = {"mode": mode, "level": level}
        total, ms = self._timed(first, image, ready, options)
        low = high = total
        took = [ms]
        for _, network in others:
            found, ms = self._timed(network, image, ready, options)
            total, low, high = total + found, np.minimum(low, found), np.maximum(high, found)
            took.append(ms)
        if others:
            total /= np.float32(len(took))
            apart = (high - low).max(axis=0)
            self.apart[key] = apart if size == given else resampled(apart[None, None], given)[0]
        self.kept[key] = total if size == given else resampled(total[None], given)
        self.times[mode, level] = took

    def _timed(self, network: Any, image: Any, ready: torch.Tensor | None, options: dict) -> tuple[np.ndarray, float]:
        """A member's probabilities and milliseconds, of the whole image `ready` or, without it, in tiles."""

        def once() -> tuple[torch.Tensor, float]:
            began = time.perf_counter()
            with torch.no_grad(), autocast(self.model.device, self.model.dtype):
                if ready is not None:
                    found = network.predict(ready, **options)[0].float().cpu()
                else:
                    tiles = {"tile": TILE} if network.over_encoder else {"max_memory": MEMORY}
                    found = predict_tiled(network, image, **tiles, **options)[0]
            return found, 1e3 * (time.perf_counter() - began)

        try:
            found, took = once()
            if took < TWICE_MS:
                found, again = once()
                took = min(took, again)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.name} cannot be predicted: {first_line(error)}") from error
        return found.numpy(), took

    def masks(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """bool `[classes, H, W]`, without the background of exclusive classes."""
        values = self.probabilities(mode, level, plane)
        if not self.model.exclusive:
            return values > 0.5
        return values.argmax(axis=0) == np.arange(1, len(values)).reshape(-1, 1, 1)

    def image(self, plane: int = 0) -> np.ndarray:
        """float32 `[1 or 3, H, W]` to look at."""
        values = self.source.images()[self._part(plane)]
        values = values if values.ndim == 3 else values[:, plane]
        values = values[:3] if len(values) >= 3 else values[:1]
        return self.source.stored.real(values).astype(np.float32)

    def overlay(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """uint8 `[H, W, 3]`: the image with its masks; a large one with fewer pixels."""
        image, masks = self.image(plane), self.masks(mode, level, plane)
        step = _step(image)
        return pictures.overlay(image[:, ::step, ::step], masks[:, ::step, ::step], self.model.colours)

    def heat(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """uint8 `[H, W, 3]`: the image in grey, and the more yellow, the further the members lie apart."""
        image, apart = self.image(plane), self.disagreement(mode, level, plane)
        step = _step(image)
        return pictures.heat(image[:, ::step, ::step], apart[::step, ::step])

    def mask(self, mode: str, level: int, plane: int = 0) -> np.ndarray:
        """uint8 of every pixel: `[H, W]`, 255 is foreground, of one class; otherwise `[H, W, 3]` in the classes' colours."""
        masks = self.masks(mode, level, plane)
        if len(masks) == 1 and not self.model.exclusive:
            return masks[0] * np.uint8(255)
        picture = np.zeros((*masks.shape[1:], 3), np.uint8)
        for mask, colour in zip(masks, self.model.colours, strict=True):
            picture[mask] = colour
        return picture


def _step(image: np.ndarray) -> int:
    """Every how many pixels of `[C, H, W]` are drawn."""
    return max(1, -(-max(image.shape[1:]) // SHOWN))


def open_file(model: Model, path: Path, name: str | None = None) -> Opened:
    """Reads a file for a model; a grey picture is repeated for one of three channels, a colour one is averaged for one.

    Raises:
        InputError: it cannot be read, or does not fit the model.
    """
    topology, name = model.network.topology, name or path.name
    dims, channels = topology.spatial_dims, topology.in_channels
    try:
        return Opened(model, name, prediction_files.read(path, dims, channels))
    except InputError as error:
        other = OTHER_CHANNELS.get(channels)
        if other is None or dims != 2:
            raise _named(error, path, name) from error
        try:
            source = prediction_files.read(path, dims, other)
        except InputError:
            raise _named(error, path, name) from error
    axes, values = source.axes, source.values
    if other == 1:
        place, note = len(axes.replace("C", "")), "a grey image, repeated for three channels"
        values = np.stack([values if "C" not in axes else values.squeeze(axes.index("C"))] * 3, axis=place)
        axes = axes.replace("C", "") + "C"
    else:
        place, note = axes.index("C"), "a colour image, its channels averaged"
        values, axes = values.mean(axis=place, dtype=np.float32), axes.replace("C", "")
    stored = replace(source.stored, values=values, axes=axes)
    return Opened(model, name, replace(source, stored=stored, axes=axes), note)


def _named(error: InputError, path: object, name: str) -> InputError:
    """The error with the name under which the file was given, in place of the path of its copy."""
    return InputError(str(error).replace(str(path), name))
