"""The network that the page shows, from a run folder, a checkpoint of any UNet++, a saved network or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import InputError
from ..data.images import STANDARD
from ..experiments import demo, pictures
from ..models.architectures import UNetPlusPlus, parameter_count
from ..models.network import Network
from ..models.pretrained import from_pretrained
from ..training.checkpoint import load_model
from ..training.classes import class_names, palette

SMALL = (8, 16, 32, 64)  # widths of the network that is trained on the sample
CHECKPOINTS = ("best.pt", "last.pt")


@dataclass(frozen=True)
class Model:
    """A network with the names and colours of its classes.

    classes: those that are shown, without the background of exclusive ones. colours: float32 `[classes, 3]`, 0 to 255.
    """

    name: str
    network: Network
    classes: tuple[str, ...]
    colours: np.ndarray
    dtype: str

    @property
    def levels(self) -> tuple[int, ...]:
        """Columns of the heads, from 1."""
        return tuple(self.network.topology.heads)

    @property
    def exclusive(self) -> bool:
        """Whether its classes exclude one another."""
        return bool(self.network.exclusive)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def describe(self) -> str:
        """A line about it."""
        topology = self.network.topology
        heads = f"heads at L{', L'.join(map(str, self.levels))}" if len(self.levels) > 1 else "one head"
        return (
            f"{self.name}: {parameter_count(self.network):,} parameters, {topology.spatial_dims}D,"
            f" {topology.in_channels} channel(s), {', '.join(self.classes)}; {heads}; {self.device}, {self.dtype}"
        )


def load(place: str, device: torch.device, dtype: str = "float32") -> Model:
    """The model at `place`: the folder of a training, a checkpoint, a folder of `save_pretrained`, or "owner/name".

    Raises:
        InputError: it is none of these, or cannot be read; the message says what to do.
    """
    path = Path(place).expanduser()
    found = next((path / name for name in CHECKPOINTS if (path / name).is_file()), None)
    if found is None and path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{path} holds no {' or '.join(CHECKPOINTS)}: give the folder of a training, or a checkpoint")
    if found is None and not path.is_file():
        if not path.is_dir() and (path.suffix or place.count("/") > 1 or place.startswith((".", "~", "/"))):
            raise InputError(f"{path} does not exist")
        return _model(place, from_pretrained(place, device=device), {}, dtype)
    network, content = load_model(found or path, device)
    if "size" in ((content.get("about") or {}).get("prepare") or {}):
        raise InputError(f"{place} was trained on images scaled to one size: use unetpp-fast predict")
    return _model(path.name if found else place, network, content, dtype)


def train_on_sample(device: torch.device, epochs: int = 3) -> Model:
    """A small UNet++ trained on the left half of the sample image; takes some seconds."""
    left, _ = demo.halves()
    recipe = demo.make_recipe(epochs)
    options = {"features": SMALL, "deep_supervision": True}
    network = demo.trained("UNet++", UNetPlusPlus, left, recipe, str(device), demo.PATCH, **options)
    network.normalisation = STANDARD
    return _model("UNet++ trained on the sample", network, {"about": {"classes": ["nuclei"]}}, "float32")


def _model(name: str, network: Network, content: dict[str, Any], dtype: str) -> Model:
    about = content.get("about") or {}
    classes, colours = class_names(network, content), palette(network, about)
    shown = classes[1:] if network.exclusive else classes
    tints = np.array(colours[1:], np.float32) if colours else pictures.COLOURS
    tints = tints[np.arange(len(shown)) % len(tints)]
    return Model(name, network.eval(), tuple(shown), tints, dtype)
