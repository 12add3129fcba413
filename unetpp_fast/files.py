"""Reading and writing: images, masks, atomic files, checkpoints. What goes wrong is said as one `InputError`."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

CHECKPOINT_FORMAT = 1


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do."""


class WriteError(InputError, OSError):
    """A file could not be written; what was there before is whole."""


def need(module: str, extra: str) -> Any:
    """Imports an optional dependency, or says which extra brings it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise InputError(f"{module.split('.')[0]} is missing: pip install 'unetpp_fast[{extra}]'") from error


def read_image(path: Path | BinaryIO) -> np.ndarray:
    """An image file, or an open one, as float32 `[C, H, W]`, C = 1 (grey) or 3 (colour; alpha is dropped), 8-bit values
    over 255, 16-bit values over 65535, floating-point values as they are.

    Raises:
        InputError: the file is missing, no image, or holds NaN or infinity.
    """
    picture = _open(path)
    if picture.mode in ("1", "L", "LA"):
        values = np.asarray(picture.convert("L"), np.float32)[None] / 255
    elif picture.mode.startswith("I"):
        values = np.asarray(picture, np.float32)[None] / 65535
    elif picture.mode == "F":
        values = np.asarray(picture, np.float32)[None]
    else:
        values = np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds NaN or infinite values: mend or remove this image")
    return np.ascontiguousarray(values)


def read_labels(path: Path) -> np.ndarray:
    """The values of a mask or label file, `[H, W]`; of a colour file the largest of its channels.

    A palette counts by its colours: the order of its entries is the writing program's choice.
    """
    picture = _open(path)
    if picture.mode in ("1", "L", "F") or picture.mode.startswith("I"):
        return np.asarray(picture)
    return np.asarray(picture.convert("RGB")).max(axis=-1)


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool `[H, W]`: above half of the file's largest value, so that 0/1 and 0/255 both work.

    Raises:
        InputError: as `read_image`.
    """
    values = read_labels(path)
    if not np.isfinite(values).all():
        raise InputError(f"mask {path} holds NaN or infinite values: mend or remove it")
    return values > values.max(initial=0) / 2


def _open(path: Path):
    image = need("PIL.Image", "commands")
    try:
        with image.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            picture.load()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
    if pages > 1:
        raise InputError(f"{path} holds {pages} pages: save each as a file of its own")
    return picture


def check_folder(folder: Path) -> None:
    """Makes the folder `folder` if there is none.

    Raises:
        InputError: that is not possible, or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder} ({error.strerror}): choose another --out") from error


def write_png(path: Path, values: np.ndarray) -> None:
    """Writes uint8 `[H, W]` (grey) or `[H, W, 3]` (colour), atomically."""
    image = need("PIL.Image", "commands")
    write_atomic(path, lambda stream: image.fromarray(values).save(stream, format="PNG"))


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file that is either the old or the new one at any moment: beside it first, then renamed over it.

    Raises:
        WriteError: the disk is full, or fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        before = "; what was there before is whole" if path.exists() else ""
        raise WriteError(f"cannot write {path} ({error.strerror or error}): make room{before}") from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes plain data and tensors, atomically; `load_checkpoint` reads them."""
    packed = io.BytesIO()  # torch.save hides why a file could not be written
    torch.save({"unetpp_fast": CHECKPOINT_FORMAT, **content}, packed)
    write_atomic(path, lambda stream: stream.write(packed.getbuffer()))


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of ours; no code in it can run (`weights_only`).

    Raises:
        InputError: the file is missing, truncated, or none of ours.
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
    except Exception as error:  # a damaged file can make the reader fail in any way
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is no readable checkpoint (truncated, or another format): {first}") from error
    if not isinstance(content, dict) or content.get("unetpp_fast") != CHECKPOINT_FORMAT or "config" not in content:
        raise InputError(f"{path} is no checkpoint of `unetpp-fast train` (format {CHECKPOINT_FORMAT})")
    return content


def load_model(path: Path, device: str | torch.device = "cpu"):
    """The network, in eval mode, and the content of a checkpoint written by `unetpp-fast train`."""
    from .models import Network

    content = load_checkpoint(path, device)
    try:
        network = Network.from_config(content["config"])
        network.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{path} does not hold the weights of the network it describes: {first}") from error
    return network.to(device).eval(), content
