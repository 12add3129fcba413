"""Checkpoints: written atomically, read without running code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..models.architectures import from_config
from ..models.encoder_network import EncodedNetwork
from ..models.network import Network

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
    path = Path(path)
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a folder: name a file in it, such as {path / 'best.pt'}")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # its advice is to load it without this protection
        raise InputError(
            f"{path} is not a readable checkpoint: it holds Python objects, which could run code, or is damaged"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"{path} is not a readable checkpoint (truncated, or another format): {first_line(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("unetpp_fast") != CHECKPOINT_FORMAT or "config" not in content:
        raise InputError(f"{path} is not a checkpoint of `unetpp-fast train` (format {CHECKPOINT_FORMAT})")
    return content


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[Network | EncodedNetwork, dict[str, Any]]:
    """The network, in eval mode, and the content of a checkpoint written by `unetpp-fast train`.

    Raises:
        InputError: as `load_checkpoint`, or the weights do not fit the network, or its encoder cannot be made.
    """
    content = load_checkpoint(path, device)
    try:
        network = from_config(content["config"])
        network.load_state_dict(content["model"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not hold the weights of the network it describes: {first_line(error)}") from error
    return network.to(device).eval(), content
