"""Checkpoints: written atomically, read without running code."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import torch_files
from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..converters.converter import convert
from ..models.architectures import from_config
from ..models.encoder_network import EncodedNetwork
from ..models.ensemble import Ensemble
from ..models.network import Network
from ..models.normalisation import Normalisation

CHECKPOINT_FORMAT = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes plain data and tensors, atomically; `load_checkpoint` reads them."""
    packed = io.BytesIO()  # torch.save into a file would hide why it cannot be written
    torch.save({"unetpp_fast": CHECKPOINT_FORMAT, **content}, packed)
    write_atomic(path, lambda stream: stream.write(packed.getbuffer()))


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of this package; no code in it can run (`weights_only`).

    Raises:
        InputError: the file is missing, truncated, or not a checkpoint of this package.
    """
    return _checked(path, torch_files.read(path, "checkpoint", device))


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("unetpp_fast") != CHECKPOINT_FORMAT or "config" not in content:
        raise InputError(f"{path} is not a checkpoint of `unetpp-fast train` (format {CHECKPOINT_FORMAT})")
    return content


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[Network | EncodedNetwork, dict[str, Any]]:
    """The network, in eval mode, and the content of a checkpoint written by `unetpp-fast train`; of another
    implementation's, what `convert` makes of it, and {}.

    Raises:
        InputError: as `load_checkpoint`, or the weights do not fit the network, its encoder cannot be made, or `convert`
            does not know them.
    """
    content = torch_files.read(path, "checkpoint", device)
    if isinstance(content, dict) and "unetpp_fast" not in content:
        try:
            return convert(content).to(device).eval(), {}
        except ValueError as error:
            raise InputError(
                f"{path} is not a checkpoint of `unetpp-fast train`, and cannot be converted: {error}"
            ) from error
    content = _checked(path, content)
    try:
        network = from_config(content["config"])
        network.load_state_dict(_weights(content))
        if "normalisation" not in content["config"]:
            network.normalisation = _of_older(content.get("about"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not hold the weights of the network it describes: {first_line(error)}") from error
    return network.to(device).eval(), content


def load_ensemble(
    places: Sequence[Path], device: str | torch.device = "cpu"
) -> tuple[Network | EncodedNetwork | Ensemble, dict[str, Any]]:
    """As `load_model`, of several checkpoints that predict together.

    Args:
        places: files, and folders of runs: of a cross-validation, `fold*/best.pt`, of a training, `best.pt`.
        device: of the networks.

    Raises:
        InputError: as `load_model`, a folder holds no such file, or the networks or their classes differ.
    """
    paths = [path for place in places for path in checkpoints(place)]
    return together([(str(path), *load_model(path, device)) for path in paths])


def together(members: Sequence[tuple[str, Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """The network that predicts as the mean of all, or the only one, and the content of the first checkpoint.

    Args:
        members: names for an error, and what `load_model` returned.

    Raises:
        InputError: the networks or their classes differ.
    """
    (name, network, content), *others = members
    if not others:
        return network, content
    for other, _, another in others:
        for key in ("classes", "palette", "prepare", "channel_files"):
            one, two = ((part.get("about") or {}).get(key) for part in (content, another))
            if one != two:
                raise InputError(f"{name} and {other} cannot predict together: their {key} are {one} and {two}")
    return Ensemble([member for _, member, _ in members]), content


def checkpoints(place: Path) -> list[Path]:
    """The file `place`, or the checkpoints of a folder: of a cross-validation, `fold*/best.pt`, of a training, `best.pt`.

    Raises:
        InputError: the folder holds no such file.
    """
    if not place.is_dir():
        return [place]
    folds = [path for path in place.glob("fold*/best.pt") if path.parent.name[4:].isdecimal()]
    found = sorted(folds, key=lambda path: int(path.parent.name[4:]))
    if not found and not (place / "best.pt").exists():
        raise InputError(
            f"{place} holds no best.pt and no fold*/best.pt: name a checkpoint, or a folder of `unetpp-fast train`"
        )
    return found or [place / "best.pt"]


def _weights(content: dict[str, Any]) -> dict[str, Any]:
    """The weights to use: of `last.pt` the moving average, if there is one."""
    averages = content.get("ema", {}).items()
    averaged = {key.removeprefix("module."): value for key, value in averages if key.startswith("module.")}
    return averaged or content["model"]


def _of_older(about: Any) -> Normalisation | None:
    """How `unetpp-fast train` prepared images when networks did not carry it yet."""
    if not isinstance(about, Mapping) or not isinstance(prepare := about.get("prepare"), Mapping) or "size" in prepare:
        return None  # of a trainer whose samples nobody knows, or of a task that scales images
    return Normalisation("window", window=prepare["window"]) if "window" in prepare else Normalisation()


def initial_network(path: Path, in_channels: int, out_channels: int, spatial_dims: int) -> Any:
    """The network of a checkpoint, as `load_model` reads it, to be trained further on data of these channels and classes.

    Raises:
        InputError: as `load_model`, or the network is for other data.
    """
    network, _ = load_model(path)
    topology = network.topology
    if (topology.in_channels, network.out_channels, topology.spatial_dims) != (in_channels, out_channels, spatial_dims):
        raise InputError(
            f"{path} holds a network for {topology.in_channels} channel(s), {network.out_channels} class(es) and"
            f" {topology.spatial_dims}D images; the data has {in_channels} channel(s), {out_channels} class(es) and is"
            f" {spatial_dims}D"
        )
    network.form = "plain"  # logits, for the loss
    return network.train()
