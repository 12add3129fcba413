"""The networks that the page shows: of run folders, checkpoints of any UNet++, saved networks and the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import InputError
from ..data.images import STANDARD
from ..experiments import demo, pictures
from ..models.architectures import AnyNetwork, UNetPlusPlus, parameter_count
from ..models.ensemble import Ensemble
from ..models.pretrained import WEIGHTS, from_pretrained
from ..training.checkpoint import checkpoints, load_model, together
from ..training.classes import class_names, palette

Member = tuple[str, Any, dict[str, Any]]  # a name, a network, and the content of its checkpoint
SMALL = (8, 16, 32, 64)  # widths of the network that is trained on the sample


@dataclass(frozen=True)
class Model:
    """A network, or several that predict together, with the names and colours of the classes.

    members: the networks by their names; a network alone is its only member. classes: those that are shown, without the
    background of exclusive ones. colours: float32 `[classes, 3]`, 0 to 255.
    """

    name: str
    network: AnyNetwork | Ensemble
    members: tuple[tuple[str, AnyNetwork], ...]
    classes: tuple[str, ...]
    colours: np.ndarray
    dtype: str

    @property
    def levels(self) -> tuple[int, ...]:
        """Columns of the heads, from 1, that every member has."""
        heads = [network.topology.heads for _, network in self.members]
        return tuple(level for level in heads[0] if all(level in others for others in heads))

    @property
    def exclusive(self) -> bool:
        """Whether its classes exclude one another."""
        return bool(self.network.exclusive)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def parameters(self, level: int) -> int:
        """The number that a pass up to a level uses, of all members together."""
        return sum(parameter_count(network.part(level, keep_heads=True)) for _, network in self.members)

    def describe(self) -> str:
        """A line about it."""
        topology = self.network.topology
        heads = f"heads at L{', L'.join(map(str, self.levels))}" if len(self.levels) > 1 else "one head"
        names = [name for name, _ in self.members]
        mean = f", the mean of {len(names)} networks ({', '.join(names)})" if len(names) > 1 else ""
        return (
            f"{self.name}{mean}: {parameter_count(self.network):,} parameters, {topology.spatial_dims}D,"
            f" {topology.in_channels} channel(s), {', '.join(self.classes)}; {heads}; {self.device}, {self.dtype}"
        )


def load(places: Sequence[str], device: torch.device, dtype: str = "float32") -> Model:
    """The model at `places`: the folder of a training or of a cross-validation, a checkpoint, a folder of
    `save_pretrained`, or "owner/name"; several predict together.

    Raises:
        InputError: one is none of these, or cannot be read, or they do not fit together; the message says what to do.
    """
    members = [member for place in places for member in _members(place, device)]
    if len(places) > 1:
        return _model(f"{len(places)} models", members, dtype)
    path = Path(places[0]).expanduser()
    short = [(Path(name).name, network, content) for name, network, content in members]
    return _model(path.resolve().name if path.is_dir() else places[0], short, dtype)


def _members(place: str, device: torch.device) -> list[Member]:
    """The names, networks and contents of the checkpoints at a place."""
    path = Path(place).expanduser()
    if not path.exists():
        if path.suffix or place.count("/") > 1 or place.startswith((".", "~", "/")):  # no name on the Hub
            raise InputError(f"{path} does not exist")
        return [(place, from_pretrained(place, device=device), {})]
    if not (path / "best.pt").is_file():
        if (path / "last.pt").is_file():  # of a training that has no best one yet
            return [(place, *load_model(path / "last.pt", device))]
        if (path / WEIGHTS).is_file():
            return [(place, from_pretrained(path, device=device), {})]
    found = checkpoints(path)
    names = [f"{place}/{file.parent.name}" if len(found) > 1 else place for file in found]
    return [(name, *load_model(file, device)) for name, file in zip(names, found, strict=True)]


def train_on_sample(device: torch.device, epochs: int = 3) -> Model:
    """A small UNet++ trained on the left half of the sample image; takes some seconds."""
    left, _ = demo.halves()
    recipe = demo.make_recipe(epochs)
    options = {"features": SMALL, "deep_supervision": True}
    network = demo.trained("UNet++", UNetPlusPlus, left, recipe, str(device), demo.PATCH, **options)
    network.normalisation = STANDARD
    return _model("UNet++ trained on the sample", [("", network, {"about": {"classes": ["nuclei"]}})], "float32")


def _model(name: str, members: Sequence[Member], dtype: str) -> Model:
    network, content = together(members)
    if "size" in ((content.get("about") or {}).get("prepare") or {}):
        raise InputError(f"{name} was trained on images scaled to one size: use unetpp-fast predict")
    classes, colours = class_names(network, content), palette(network, content.get("about") or {})
    shown = classes[1:] if network.exclusive else classes
    tints = pictures.class_colours(colours) if colours else pictures.COLOURS
    tints = tints[np.arange(len(shown)) % len(tints)]
    model = Model(name, network.eval(), tuple((one, member) for one, member, _ in members), tuple(shown), tints, dtype)
    if not model.levels:
        raise InputError(f"the networks of {name} have no level in common: their heads are at different depths")
    return model
