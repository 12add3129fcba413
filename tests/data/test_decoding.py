"""Pictures of every kind, read alike for training and for prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from support.command_line import run
from support.helpers import build

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data import prediction_files
from unetpp_fast.data.decoding import ORIENTATION
from unetpp_fast.data.images import STANDARD, read_image, standardise
from unetpp_fast.data.masks import read_mask
from unetpp_fast.data.samples import Sample
from unetpp_fast.training.checkpoint import save_checkpoint
from unetpp_fast.training.evaluation import evaluate

imagecodecs = pytest.importorskip("imagecodecs", reason="writes 16-bit colours")
SIZE = (9, 14)
GREY = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
DEEP = np.random.default_rng(2).integers(0, 4096, (*SIZE, 3)).astype(np.uint16)  # 12 bits in 16


def pillow(values: np.ndarray, mode: str | None = None, **options):
    picture = Image.fromarray(values)
    return lambda path: (picture.convert(mode) if mode else picture).save(path, **options)


def tiff(values: np.ndarray, **options):
    return lambda path: tifffile.imwrite(path, values, **{"photometric": "minisblack", **options})


def palette(path: Path) -> None:
    picture = Image.fromarray(GREY % 3)
    picture.putpalette([10, 20, 30, 250, 240, 0, 7, 90, 200])
    picture.save(path)


def lab(path: Path) -> None:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    ImageCms.applyTransform(Image.fromarray(RGB), ImageCms.buildTransform(*profiles, "RGB", "LAB")).save(path)


def phone(path: Path) -> None:
    """A JPEG with a second, smaller picture behind the first, which is what counts."""
    first, second = Image.fromarray(SMOOTH), Image.new("RGB", (10, 6))
    first.save(path, format="MPO", save_all=True, append_images=[second], quality=95)


def deep_png(values: np.ndarray):
    return lambda path: path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))


SMOOTH = np.mgrid[:24, :40].sum(axis=0)[..., None].repeat(3, axis=2).astype(np.uint8) * 4
PALETTE = np.array([[10, 20, 30], [250, 240, 0], [7, 90, 200]])[GREY % 3]
CMYK = 1 - np.dstack([GREY, GREY // 2, GREY // 3]) / 255
# name: what writes the file, the pixels it shows up to a factor (None: of Pillow's own conversion), the error allowed
KINDS = {
    "l.png": (pillow(GREY), GREY, 0),
    "l.bmp": (pillow(GREY), GREY, 0),
    "la.png": (pillow(np.dstack([GREY, GREY[::-1]])), GREY, 0),
    "i16.png": (pillow(DEEP[..., 0]), DEEP[..., 0], 0),
    "rgb16.png": (deep_png(DEEP), DEEP, 0),
    "rgba16.png": (deep_png(np.dstack([DEEP, DEEP[..., :1]])), DEEP, 0),
    "la16.png": (deep_png(DEEP[..., :2]), DEEP[..., 0], 0),
    "low16.png": (deep_png(RGB.astype(np.uint16)), RGB, 0),
    "palette.png": (palette, PALETTE, 0),
    "palette.tif": (palette, PALETTE, 0),
    "cmyk.jpg": (pillow(RGB, "CMYK"), None, 0),
    "cmyk.tif": (tiff(np.dstack([GREY, GREY // 2, GREY // 3, GREY * 0]), photometric="separated"), CMYK, 0),
    "lab.tif": (lab, RGB, 0.03),
    "ycbcr.tif": (lambda path: Image.fromarray(RGB).convert("YCbCr").save(path), RGB, 0.03),
    "jpeg.tif": (pillow(RGB, compression="jpeg"), None, 0),
    "phone.jpg": (phone, SMOOTH, 0.05),
    "rgb16.tif": (tiff(DEEP, photometric="rgb"), DEEP, 0),
    "planar.tif": (tiff(DEEP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), DEEP, 0),
    "uint32.tif": (tiff(DEEP[..., 0].astype(np.uint32) + 4_000_000_000), DEEP[..., 0], 0),
    "int8.tif": (tiff(GREY.view(np.int8)), GREY.view(np.int8), 0),
    "float64.tif": (tiff(GREY / 7 - 3), GREY / 7 - 3, 0),
    "white.tif": (tiff(GREY, photometric="miniswhite"), 255 - GREY.astype(int), 0),
    "white16.tif": (tiff(DEEP[..., 0], photometric="miniswhite"), -DEEP[..., 0].astype(int), 0),
    "bit.tif": (pillow(GREY > 99), GREY > 99, 0),
    "png.tif": (pillow(RGB, format="PNG"), RGB, 0),
}  # fmt: skip


def shown(values: np.ndarray) -> np.ndarray:
    """Standardised `[C, H, W]` of the pixels `[H, W]` or `[H, W, C]`."""
    return standardise(np.moveaxis(np.atleast_3d(values).astype(np.float64), -1, 0))


def predicted(path: Path, channels: int) -> np.ndarray:
    """What `predict` gives to the network."""
    source = prediction_files.read(path, 2, channels)
    (image,) = source.images()
    return prediction_files.Prepared(source, image, STANDARD)[0, :, :, :]


@pytest.mark.parametrize("name", KINDS)
def test_training_and_prediction_read_the_same_and_the_right_pixels(name, tmp_path):
    write, pixels, error = KINDS[name]
    path = tmp_path / name
    write(path)
    wanted = shown(np.asarray(Image.open(path).convert("RGB")) if pixels is None else pixels)
    Image.new("L", wanted.shape[:0:-1]).save(tmp_path / "m.png")
    trained, _ = Sample("x", path, (tmp_path / "m.png",)).load()
    np.testing.assert_allclose(predicted(path, len(trained)), trained, atol=1e-5)
    assert trained.shape == wanted.shape and np.abs(trained - wanted).mean() <= error + 1e-5


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_pictures_are_turned_upright(ending, tmp_path):
    """All eight orientation tags: the corner marked in the stored picture goes where ImageOps puts it; masks likewise."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 255
    stored[8:, 24:] = 128
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{ending}"
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        if ending == "tif":
            tifffile.imwrite(path, stored, extratags=[(ORIENTATION, "H", 1, orientation, True)])
        else:
            Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if ending == "jpg" else {}))
        reference = Image.fromarray(stored)
        reference.getexif()[ORIENTATION] = orientation
        upright = np.asarray(ImageOps.exif_transpose(reference), np.float64)
        Image.fromarray((upright > 200).astype(np.uint8)).save(tmp_path / "mask.png")
        image, mask = Sample("x", path, (tmp_path / "mask.png",)).load()
        assert np.abs(image[0] - shown(upright)[0]).max() < 0.05, orientation
        assert np.array_equal(mask[0], upright > 200)
        np.testing.assert_allclose(predicted(path, 1), image, atol=1e-5)
        if ending == "png" and orientation == 6:
            Image.fromarray(stored // 255).save(tmp_path / "mask.png", exif=exif)
            assert np.array_equal(read_mask(tmp_path / "mask.png"), upright > 200)  # turned by its own tag
            Image.fromarray(stored // 255).save(tmp_path / "mask.png")
            with pytest.raises(InputError, match="draw it on the upright image"):
                Sample("x", path, (tmp_path / "mask.png",)).load()


def test_what_is_not_read_says_so(tmp_path):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, DEEP, photometric="cielab")
    with pytest.raises(InputError, match="CIELAB of 16 bits: save it as RGB"):
        read_image(path)
    tifffile.imwrite(path, np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="holds 3 pages"):
        read_image(path)
    path.write_bytes(b"II*\0\x08\0\0\0\xff")
    with pytest.raises(InputError, match="cannot be read as TIFF"):
        read_image(path)


def test_a_white_is_zero_set_is_predicted_as_it_was_trained(tmp_path):
    """The same picture as TIFF of both polarities gives the same mask by the command."""
    model = build(uf.UNetPlusPlus, 1, 1, spatial_dims=2, features=(3, 4), deep_supervision=True).eval()
    save_checkpoint(tmp_path / "m.pt", {"config": model.config, "model": model.state_dict(), "about": {}})
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/black.tif", GREY, photometric="minisblack")
    tifffile.imwrite(tmp_path / "in/white.tif", 255 - GREY, photometric="miniswhite")
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "in", "--out", tmp_path / "out") == 0
    black, white = (tifffile.imread(tmp_path / f"out/masks/0/{name}.tif") for name in ("black", "white"))
    assert np.array_equal(black, white)


@pytest.mark.parametrize("name", ["white.tif", "3.jpg", "6.png"])
def test_what_validation_scores_is_what_the_command_writes(name, tmp_path):
    """Of white-is-zero files and those with an orientation tag, whose masks are drawn on what they show."""
    shown_upright = GREY.repeat(2, axis=0).repeat(2, axis=1)
    turns = {"3.jpg": 2, "6.png": 1}.get(name, 0)
    stored, (folder, path) = np.rot90(shown_upright, turns), (tmp_path / "in", tmp_path / "in" / name)
    folder.mkdir()
    if turns:
        exif = Image.Exif()
        exif[ORIENTATION] = int(name[0])
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **({"quality": 95} if name == "3.jpg" else {}))
    else:
        tifffile.imwrite(path, 255 - stored, photometric="miniswhite")
    truth = shown_upright > 120
    Image.fromarray(truth).save(tmp_path / "mask.png")
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4), deep_supervision=True).eval()
    scores = evaluate(model, [Sample("x", path, (tmp_path / "mask.png",))])
    save_checkpoint(tmp_path / "m.pt", {"config": model.config, "model": model.state_dict(), "about": {}})
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", folder, "--out", tmp_path / "out") == 0
    written = read_mask(next((tmp_path / "out/masks/0").iterdir()))
    assert 0 < written.mean() < 1
    assert (written & truth).sum() / (written | truth).sum() == pytest.approx(scores["iou"], abs=1e-6)
