"""`unetpp-fast predict` on every format: what it reads, what it writes in the same format, and its error messages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from support.command_line import fails, run
from support.helpers import build

import unetpp_fast as uf
from unetpp_fast.data import images, prediction_files
from unetpp_fast.training.checkpoint import load_model, save_checkpoint

GRID = ((0.5, 0.7, 2.5), (10.0, -3.0, 7.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))  # spacing, origin, directions
AFFINE = np.array([[-0.5, 0, 0, 10], [0, 0.7, 0.1, -3], [0, 0, 2.5, 7], [0, 0, 0, 1]])


def save(path: Path, spatial_dims: int, channels: int = 1, prepare: dict | None = None) -> uf.Network:
    model = build(uf.UNetPlusPlus, channels, 2, spatial_dims=spatial_dims, features=(3, 4), deep_supervision=True).eval()
    about = {"classes": ["a", "b"], "prepare": prepare or {}}
    save_checkpoint(path, {"config": model.config, "model": model.state_dict(), "about": about})
    return load_model(path)[0]


def values(*shape: int, dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250 if dtype == np.uint8 else 4000, shape).astype(dtype)


def expected(model: uf.Network, image: np.ndarray) -> np.ndarray:
    """Probabilities `[classes, *S]` of an image `[C, *S]`."""
    return model.predict(torch.from_numpy(images.standardise(image))[None])[0].numpy()


def store(path: Path, image: np.ndarray) -> None:
    """Writes planes, rows, columns in the format of the path."""
    kind = path.name.partition(".")[2]
    if kind == "npy":
        np.save(path, image)
    elif kind == "npz":
        np.savez(path, image=image, other=image[:1])
    elif kind.startswith("nii"):
        nibabel = pytest.importorskip("nibabel", reason="writes NIfTI")
        nibabel.save(nibabel.Nifti1Image(image.T.astype(np.int16), AFFINE), path)
    elif kind in ("mha", "nrrd"):
        picture = sitk.GetImageFromArray(image)
        picture.SetSpacing(GRID[0])
        picture.SetOrigin(GRID[1])
        picture.SetDirection(GRID[2])
        sitk.WriteImage(picture, str(path))
    else:
        tifffile = pytest.importorskip("tifffile", reason="writes TIFF")
        tifffile.imwrite(path, image, compression="zlib" if kind == "tiff" else None, photometric="minisblack")


def load(path: Path) -> np.ndarray:
    kind = path.name.partition(".")[2]
    if kind == "npy":
        return np.load(path)
    if kind == "npz":
        with np.load(path) as archive:
            return archive[archive.files[0]]
    if kind.startswith("nii"):
        image = pytest.importorskip("nibabel").load(path)
        assert np.allclose(image.affine, AFFINE)
        return np.asarray(image.dataobj).T
    if kind in ("mha", "nrrd"):
        picture = sitk.ReadImage(str(path))
        for found, wanted in zip((picture.GetSpacing(), picture.GetOrigin(), picture.GetDirection()), GRID, strict=True):
            assert np.allclose(found, wanted)
        return sitk.GetArrayFromImage(picture)
    return pytest.importorskip("tifffile").imread(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".tif", ".tiff", ".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_volume_in_and_masks_out_in_its_format(ending, spatial_dims, tmp_path):
    """A model for images predicts plane by plane; each plane is standardised alone, as in training."""
    model = save(tmp_path / "m.pt", spatial_dims)
    image, path, out = values(5, 17, 22), tmp_path / f"v{ending}", tmp_path / "out"
    store(path, image)
    if spatial_dims == 3:
        wanted = expected(model, image[None])
    else:
        wanted = np.stack([expected(model, plane[None]) for plane in image], axis=1)
    threshold = round(float(np.median(wanted)), 3)
    flags = ("--probabilities", "--threshold", threshold)
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", path, "--out", out, *flags) == 0
    for index, label in enumerate("ab"):
        probabilities = load(out / "probabilities" / label / f"v{ending}")
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, wanted[index], rtol=1e-5, atol=1e-6)
        mask = load(out / "masks" / label / f"v{ending}")
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, (probabilities > threshold) * np.uint8(255 if "tif" in ending else 1))
    assert 0 < (wanted > threshold).mean() < 1
    assert sorted(folder.name for folder in out.iterdir()) == ["masks", "probabilities"]  # no temporary file is left


@pytest.mark.parametrize("form", ["png", "rgb.tif", "rgba.tif", "chw.npy", "hwc.npy", "lzw.tif"])
def test_colours(form, tmp_path):
    pytest.importorskip("tifffile", reason="reads TIFF")
    model = save(tmp_path / "m.pt", 2, channels=3)
    image, path = values(3, 18, 26, dtype=np.uint8), tmp_path / f"x.{form.rpartition('.')[2]}"
    last = np.ascontiguousarray(image.transpose(1, 2, 0))
    if form.endswith("npy"):
        np.save(path, image if form == "chw.npy" else last)
    elif form == "rgba.tif":
        Image.fromarray(np.dstack([last, last[..., 0]])).save(path)
    elif form == "lzw.tif":
        pytest.importorskip("imagecodecs", reason="decodes LZW")
        Image.fromarray(last).save(path, compression="tiff_lzw")
    else:
        Image.fromarray(last).save(path)
    out = tmp_path / "out"
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", path, "--out", out, "--probabilities") == 0
    if form == "png":
        probabilities = np.asarray(Image.open(out / "probabilities/a/x.png")) / 65535
    else:
        probabilities = load(out / "probabilities/a" / path.name)
    np.testing.assert_allclose(probabilities, expected(model, image)[0], atol=1e-5)
    assert (out / "overlays/x.png").exists() == (form == "png")


def test_tiles_and_a_memory_budget(tmp_path, monkeypatch):
    model = save(tmp_path / "m.pt", 2)
    np.save(tmp_path / "x.npy", values(90, 70))
    arguments = ("predict", "--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "x.npy", "--probabilities")
    x = torch.from_numpy(images.standardise(values(90, 70)[None]))[None]
    for flags, options in (
        (("--tile", "32"), {"tile": 32}),
        (("--tile", "32x16", "--overlap", "0.5"), {"tile": (32, 16), "overlap": 0.5}),
        (("--tile", "32,16", "--overlap", "0.5,0"), {"tile": (32, 16), "overlap": (0.5, 0)}),
        (("--max-memory", "17M"), {"max_memory": "17M"}),
    ):
        assert run(*arguments, "--out", tmp_path / "out", *flags) == 0
        probabilities = np.load(tmp_path / "out/probabilities/a/x.npy")
        wanted = uf.predict_tiled(model, x, **options)[0, 0].numpy()
        np.testing.assert_allclose(probabilities, wanted, rtol=1e-5, atol=1e-6)


def test_a_folder_of_several_formats(tmp_path):
    save(tmp_path / "m.pt", 2)
    (tmp_path / "in").mkdir()
    store(tmp_path / "in/one.nii.gz", values(2, 9, 8))
    store(tmp_path / "in/two.npy", values(2, 9, 8))
    Image.fromarray(values(9, 8, dtype=np.uint8)).save(tmp_path / "in/three.png")
    assert run("predict", "--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "in", "--out", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out/masks/a").iterdir())
    assert names == ["one.nii.gz", "three.png", "two.npy"]


def test_a_bad_file_does_not_end_the_others(tmp_path, capsys):
    save(tmp_path / "m.pt", 2)
    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        store(tmp_path / f"in/{name}.npy", values(9, 8))
    Image.fromarray(values(9, 8, 3, dtype=np.uint8)).save(tmp_path / "in/b.png")
    (tmp_path / "in/d.png").write_bytes(b"no picture")
    arguments = ("predict", "--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert "2 image(s): " in said.out and sorted(path.name for path in (tmp_path / "out/masks/a").iterdir()) == [
        "a.npy",
        "c.npy",
    ]
    lines = [line for line in said.err.splitlines() if "error: " in line]
    assert len(lines) == 2 and "b.png has 3 channel(s)" in lines[0] and "d.png cannot be read" in lines[1]


def test_values_are_prepared_as_in_training(tmp_path):
    """Hounsfield units are mapped by the window in the checkpoint, after the scaling in the header."""
    nibabel = pytest.importorskip("nibabel", reason="writes NIfTI")
    window = (-200.0, 250.0)
    model = save(tmp_path / "m.pt", 3, prepare={"window": window})
    real = np.linspace(-400, 400, 6 * 8 * 10, dtype=np.float32).reshape(6, 8, 10)
    image = nibabel.Nifti1Image(real.T, AFFINE)
    image.header.set_data_dtype(np.int16)  # nibabel chooses slope and offset
    nibabel.save(image, tmp_path / "v.nii.gz")
    stored = np.asarray(nibabel.load(tmp_path / "v.nii.gz").dataobj, np.float32).T
    arguments = ("--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "v.nii.gz", "--out", tmp_path / "out")
    assert run("predict", *arguments, "--probabilities") == 0
    wanted = model.predict(torch.from_numpy(images.rescale(stored, window))[None, None])[0, 0]
    np.testing.assert_allclose(load(tmp_path / "out/probabilities/a/v.nii.gz"), wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npy", b"\x93NUMPY\x01\x00broken", "cannot be read as an array"),
        ("x.npz", b"PK broken", "cannot be read as an archive of arrays"),
        ("x.tif", b"II*\0\x08\0\0\0\xff", "cannot be read as TIFF"),
        ("x.nii", b"\0" * 400, "cannot be read as NIfTI"),
        ("x.nii.gz", b"\x1f\x8b\x08\0broken", "cannot be read as NIfTI"),
        ("x.txt", b"text", "has an unknown format"),
        ("x.npy", np.zeros((8, 8), "c16"), "holds no image: complex128"),
        ("x.npy", np.zeros((0, 8)), "holds no image"),
        ("x.npy", np.full((8, 8), np.nan), "holds NaN or infinite values"),
        ("x.npy", np.zeros((8, 8, 3)), "which a 2D model of 1 channel(s) does not take"),
        ("x.npy", np.zeros(8), "which a 2D model of 1 channel(s) does not take"),
        ("x.npz", {"a": np.zeros((8, 8)), "b": np.zeros((8, 8))}, "holds 2 arrays (a, b): call the one to predict `image`"),
        ("x.npy", np.array([{}], dtype=object), "cannot be read as an array"),
    ],
)
def test_a_bad_file_is_one_line(name, content, says, tmp_path, capsys):
    if name.endswith((".tif", ".nii", ".nii.gz")):
        pytest.importorskip("tifffile", reason="reads TIFF")
        pytest.importorskip("nibabel", reason="reads NIfTI")
    save(tmp_path / "m.pt", 2)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content, allow_pickle=True)
    text = fails(capsys, "predict", "--checkpoint", tmp_path / "m.pt", "--images", path, "--out", tmp_path / "out")
    assert says in text and name in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tile", "33"), "tile must be a positive multiple of 2"),
        (("--tile", "big"), "'big' is not a size such as 512"),
        (("--tile", "32x32x32"), "or 2 of them"),
        (("--overlap", "1", "--tile", "32"), "overlap must be 0 or more and below 1"),
        (("--overlap", "0.5,0.5,0.5", "--tile", "32"), "or 2 such numbers, not (0.5, 0.5, 0.5)"),
        (("--overlap", "half"), "'half' is not a share such as 0.25"),
        (("--max-memory", "much"), "'much' is not an amount of memory"),
        (("--max-memory", "1K"), "is too small for tiles"),
    ],
)
def test_a_bad_flag_is_one_line(flags, says, tmp_path, capsys):
    save(tmp_path / "m.pt", 2)
    np.save(tmp_path / "x.npy", values(40, 40))
    arguments = ("predict", "--checkpoint", tmp_path / "m.pt", "--images", tmp_path / "x.npy", "--out", tmp_path / "out")
    assert says in fails(capsys, *arguments, *flags)
    assert not (tmp_path / "out").exists()


def test_wrong_axes_and_channels_and_missing_extras_are_named(tmp_path, capsys, monkeypatch):
    save(tmp_path / "m.pt", 3)
    arguments = ("predict", "--checkpoint", tmp_path / "m.pt", "--out", tmp_path / "out", "--images")
    Image.fromarray(values(9, 8, dtype=np.uint8)).save(tmp_path / "x.png")
    assert "has the axes YX, the model takes volumes" in fails(capsys, *arguments, tmp_path / "x.png")
    store(tmp_path / "x.nii", np.zeros((2, 3, 4, 5)))
    assert "has 2 channel(s), the model takes 1" in fails(capsys, *arguments, tmp_path / "x.nii")
    for module, name, extra in (("tifffile", "x.tif", "tiff"), ("nibabel", "x.nii", "nifti")):
        (tmp_path / name).write_bytes(b"II*\0")
        monkeypatch.setitem(sys.modules, module, None)
        text = fails(capsys, *arguments, tmp_path / name)
        assert f"{module} is missing: pip install 'unetpp_fast[{extra}]'" in text


def test_statistics_by_chunks_equal_those_of_the_whole(monkeypatch, tmp_path):
    np.save(tmp_path / "x.npy", values(2, 30, 40, 50))
    source = prediction_files.read(tmp_path / "x.npy", 3, 2)
    monkeypatch.setattr(prediction_files, "CHUNK_BYTES", 8 * 2 * 40 * 50 * 7)
    (image,) = source.images()
    part = prediction_files.Prepared(source, image, images.STANDARD)[0, :, 3:9, :, 4:5]
    np.testing.assert_allclose(part, images.standardise(values(2, 30, 40, 50))[:, 3:9, :, 4:5], rtol=1e-6, atol=1e-7)
