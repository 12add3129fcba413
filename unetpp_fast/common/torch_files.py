"""Files of `torch.save`, read without running code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, first_line


def read(path: str | os.PathLike, what: str, device: str | torch.device = "cpu") -> Any:
    """The tensors and plain data in a file; `what` it should be, for messages.

    Raises:
        InputError: the file is missing, damaged, or holds Python objects; the message says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder: name a file in it, such as {path / 'best.pt'}")
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist")
    try:
        if not zipfile.is_zipfile(path) and _first_byte(path) != b"\x80":  # the archive, or the pickle of torch < 1.6
            raise ValueError("not a zip archive")
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # its advice is to load it without this protection
        raise InputError(
            f"{path} is not a readable {what}: it holds Python objects, which could run code, or is damaged. If it is"
            " yours, load it in the program that wrote it and save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a readable {what} (truncated, or another format): {first_line(error)}") from error


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1)
