"""One way to decode pictures, for training, masks and prediction: Pillow, and tifffile for TIFF.

The file's content decides, not its ending. What both ways give has the same rules:

- Orientation tags (EXIF, XMP, TIFF) are applied: pictures are upright.
- Values stay as stored, in full depth; `slope` and `offset` undo white-is-zero.
- Palettes are kept beside the indices; transparency is kept apart.
- CMYK, YCbCr and CIELAB become RGB.
- Of a JPEG with several pictures (previews, depth and gain maps of phones) the first counts; other files hold one picture,
  or in TIFF one stack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import InputError, first_line
from ..common.extras import need
from .stored import Stored, path_of

ORIENTATION = 274  # the tag's number in EXIF and TIFF
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GREY, COLOUR = "YX", "YXC"


@dataclass(frozen=True)
class Decoded:
    """A picture, or a stack of them.

    values: as stored; indices if there is a palette.
    axes: one letter per axis, as in `Stored`.
    names: the axes without C as the file calls them, for writing such a file again.
    slope, offset, scale: as in `Stored`.
    palette: uint8 `[entries, 3]`, or None.
    alpha: transparency, of the shape of the values without C, or None.
    lossy: whether the values may have been changed by JPEG.
    """

    values: np.ndarray
    axes: str
    names: str = GREY
    slope: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    palette: np.ndarray | None = None
    alpha: np.ndarray | None = None
    lossy: bool = False


def decode(file: Path | BinaryIO) -> Decoded:
    """A picture, upright.

    Raises:
        InputError: the file is missing or damaged, is of a kind that is not read, or holds several pictures.
    """
    kind = "an image"
    try:
        start = _start(file)
        if start[:4] in TIFF_MAGIC:
            kind = "TIFF"
            decoded, orientation = _by_tifffile(file)
        else:
            decoded, orientation = _by_pillow(file, start)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path_of(file)} does not exist") from None
    except Exception as error:  # a damaged file can make a library fail in any way
        raise InputError(f"{path_of(file)} cannot be read as {kind} ({first_line(error)}): replace or remove it") from error
    return _upright(decoded, orientation)


def read_picture(file: Path | BinaryIO) -> Stored:
    """A picture, upright: grey `[Y, X]` or colour with an axis C of 3; without its transparency. Errors as `decode`."""
    decoded = decode(file)
    values, axes = decoded.values, decoded.axes
    if decoded.palette is not None:
        values, axes = decoded.palette[values], axes + "C"
    return Stored(file, values, axes, decoded.names, decoded.slope, decoded.offset, decoded.scale)


def check_one(decoded: Decoded, file: Any) -> None:
    """Raises InputError if a file for training is a stack."""
    if "Z" in decoded.axes:
        pages = decoded.values.shape[decoded.axes.index("Z")]
        raise InputError(f"{path_of(file)} holds {pages} pages: save each page as a separate file")


def _start(file: Path | BinaryIO) -> bytes:
    """The first bytes: enough to tell the kind of file, and the depth of a PNG."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as stream:
            return stream.read(26)
    file.seek(0)
    start = file.read(26)
    file.seek(0)
    return start


def _upright(decoded: Decoded, orientation: int) -> Decoded:
    """The picture turned and mirrored as its orientation tag, 1 to 8, asks for."""
    y = decoded.axes.index("Y")

    def turned(values: np.ndarray | None, y: int) -> np.ndarray | None:
        if values is None or orientation not in range(2, 9):
            return values
        values = values.swapaxes(y, y + 1) if orientation >= 5 else values
        values = np.flip(values, y + 1) if orientation in (2, 3, 6, 7) else values
        return np.flip(values, y) if orientation in (3, 4, 7, 8) else values

    before = decoded.axes[:y].replace("C", "")
    return replace(decoded, values=turned(decoded.values, y), alpha=turned(decoded.alpha, len(before)))


def _by_pillow(file: Path | BinaryIO, start: bytes) -> tuple[Decoded, int]:
    with need("PIL.Image", "commands").open(file) as picture:
        pages = getattr(picture, "n_frames", 1)
        if pages > 1 and picture.format != "MPO":
            raise InputError(f"{path_of(file)} holds {pages} pages: save each page as a separate file")
        picture.load()
        orientation = picture.getexif().get(ORIENTATION, 1)
        lossy = picture.format in ("JPEG", "MPO")
    deep = start[:4] == b"\x89PNG" and start[24] == 16 and start[25] in (2, 4, 6)
    decoded = _deep_png(file) if deep else _from_pillow(picture)  # Pillow cuts 16-bit colours to 8 bits
    return replace(decoded, lossy=lossy), orientation


def _from_pillow(picture: Any) -> Decoded:
    mode, byte = picture.mode, 1 / 255
    if mode == "P":
        clear = np.asarray(picture.convert("RGBA"))[..., 3] if "transparency" in picture.info else None
        colours = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return Decoded(np.asarray(picture), GREY, palette=colours, alpha=clear, scale=byte)
    if mode in ("1", "L"):
        return Decoded(np.asarray(picture.convert("L")), GREY, scale=byte)
    if mode in ("LA", "La"):
        values = np.asarray(picture.convert("LA"))
        return Decoded(values[..., 0], GREY, alpha=values[..., 1], scale=byte)
    if mode.startswith("I"):
        return Decoded(np.asarray(picture), GREY, scale=1 / 65535)
    if mode == "F":
        return Decoded(np.asarray(picture), GREY)
    if mode in ("RGBA", "RGBa", "PA"):
        values = np.asarray(picture.convert("RGBA"))
        return Decoded(values[..., :3], COLOUR, alpha=values[..., 3], scale=byte)
    return Decoded(np.asarray(picture.convert("RGB")), COLOUR, scale=byte)


def _deep_png(file: Path | BinaryIO) -> Decoded:
    if not isinstance(file, (str, Path)):
        file.seek(0)
    data = Path(file).read_bytes() if isinstance(file, (str, Path)) else file.read()
    values = need("imagecodecs", "tiff").png_decode(data)
    colours, has_alpha = values.shape[-1] - (values.shape[-1] in (2, 4)), values.shape[-1] in (2, 4)
    alpha = values[..., -1] if has_alpha else None
    if colours == 1:
        return Decoded(values[..., 0], GREY, alpha=alpha, scale=1 / 65535)
    return Decoded(values[..., :3], COLOUR, alpha=alpha, scale=1 / 65535)


def _by_tifffile(file: Path | BinaryIO) -> tuple[Decoded, int]:
    tifffile = need("tifffile", "tiff")
    with tifffile.TiffFile(file) as tiff:
        if len(tiff.series) != 1:
            raise InputError(
                f"{path_of(file)} holds {len(tiff.series)} images of different kinds: save each as a separate file"
            )
        series, page = tiff.series[0], tiff.pages[0]
        orientation = int(page.tags.valueof(ORIENTATION, default=1))
        kind = tifffile.PHOTOMETRIC
        lossy = page.compression in (6, 7, 33007, 34892)  # kinds of JPEG; tifffile makes their YCbCr RGB
        if page.photometric == kind.CIELAB or (page.photometric == kind.YCBCR and not lossy):
            return _converted_tiff(file, page), orientation
        if page.photometric not in (kind.MINISWHITE, kind.MINISBLACK, kind.RGB, kind.PALETTE, kind.SEPARATED, kind.YCBCR):
            raise InputError(f"{path_of(file)} holds colours of the kind {kind(page.photometric).name}: save it as RGB")
        if page.compression not in (1, 8, 32946):  # tifffile itself decodes none and deflate
            need("imagecodecs", "tiff")
        if series.dataoffset is not None and isinstance(file, (str, Path)):
            values = tifffile.memmap(file, mode="r", series=0)
        else:  # its pages are decoded one by one into a temporary file
            values = series.asarray(out="memmap", maxworkers=1)
        axes = "".join({"S": "C", "Y": "Y", "X": "X", "C": "C"}.get(axis, "Z") for axis in series.axes)
        if len(set(axes)) != len(axes) or "YX" not in axes:
            raise InputError(f"{path_of(file)} has the axes {series.axes}: save each volume as a separate file")
        names = series.axes.replace("S", "").replace("C", "")
        decoded = _scaled_tiff(Decoded(values, axes, names, lossy=lossy), page, kind)
        return _without_alpha(decoded, page, kind, file), orientation


def _scaled_tiff(decoded: Decoded, page: Any, kind: Any) -> Decoded:
    """With the scale of its depth, and the slope of white-is-zero or the palette."""
    whole, bits = decoded.values.dtype.kind in "ub", page.bitspersample
    scale = 1 / (2**bits - 1) if whole and bits <= 16 else 1.0
    if page.photometric == kind.MINISWHITE:
        white = 2**bits - 1 if whole else -1 if decoded.values.dtype.kind == "i" else 1
        return replace(decoded, slope=-1.0, offset=float(white), scale=scale)
    if page.photometric == kind.PALETTE:
        table = np.asarray(page.colormap)
        table = (table >> 8 if table.max() > 255 else table).astype(np.uint8).T
        return replace(decoded, palette=table, scale=1 / 255)
    return replace(decoded, scale=scale)


def _without_alpha(decoded: Decoded, page: Any, kind: Any, file: Any) -> Decoded:
    """With transparency apart from the colours, and CMYK as RGB."""
    if "C" not in decoded.axes:
        return decoded
    samples = np.moveaxis(decoded.values, decoded.axes.index("C"), -1)
    axes = decoded.axes.replace("C", "") + "C"
    extra = page.extrasamples if page.samplesperpixel == samples.shape[-1] else ()
    clear = [index for index, use in enumerate(extra, samples.shape[-1] - len(extra)) if use in (1, 2)]
    alpha = samples[..., clear[0]] if clear else None
    if page.photometric == kind.SEPARATED:
        if samples.shape[-1] < 4:
            raise InputError(f"{path_of(file)} holds {samples.shape[-1]} inks, CMYK has 4: save it as RGB")
        inks = samples[..., :4].astype(np.float32) * np.float32(decoded.scale)
        return replace(decoded, values=(1 - inks[..., :3]) * (1 - inks[..., 3:]), axes=axes, alpha=alpha, scale=1.0)
    colours = page.photometric in (kind.RGB, kind.YCBCR)
    count = 3 if colours else samples.shape[-1] - len(clear)
    if not colours and count == 1:
        return replace(decoded, values=samples[..., 0], axes=axes[:-1], alpha=alpha)
    return replace(decoded, values=samples[..., :count], axes=axes, alpha=alpha)


def _converted_tiff(file: Path | BinaryIO, page: Any) -> Decoded:
    """A TIFF whose colours Pillow converts."""
    if page.bitspersample != 8:
        raise InputError(f"{path_of(file)} holds {page.photometric.name} of {page.bitspersample} bits: save it as RGB")
    if not isinstance(file, (str, Path)):
        file.seek(0)
    return _by_pillow(file, b"")[0]
