"""Whole numbers are prepared as in training, by whatever way they come in; nothing is guessed."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.command_line import run
from support.folders import write_nuclei
from support.helpers import FLOAT32, assert_close_relative, build

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data import samples
from unetpp_fast.data.images import read_normalised, read_values
from unetpp_fast.data.masks import read_mask
from unetpp_fast.data.pairs import find_samples
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.readers.liver import SliceSample
from unetpp_fast.models import normalisation
from unetpp_fast.training import checkpoint
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer

KINDS = {
    "image": uf.Normalisation(),
    "dataset": uf.Normalisation("dataset", (0.3, 0.5), (0.2, 0.1)),
    "window": uf.Normalisation("window", window=(-100, 300)),
}


def network(**options) -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 2, 2, features=(3, 4, 5), deep_supervision=True, **options).eval()


def expected(kind: str, image: np.ndarray) -> torch.Tensor:
    """`[N, 2, *S]` in float64, from the formulas."""
    x = torch.from_numpy(image.astype(np.float64))
    if kind == "window":
        return (x.clip(-100, 300) + 100) / 200 - 1
    x = x / {"uint8": 255, "uint16": 65535}.get(image.dtype.name, 1)
    if kind == "dataset":
        return (x - torch.tensor([0.3, 0.5]).view(2, 1, 1)) / torch.tensor([0.2, 0.1]).view(2, 1, 1)
    axes = (2, 3)
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True, correction=0).clamp(min=1e-6)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("image", "uint8"),
        ("image", "int64"),
        ("image", "bool"),
        ("dataset", "uint8"),
        ("dataset", "uint16"),
        ("window", "int16"),
    ],
)
def test_every_entry_point_prepares_whole_numbers(kind, dtype, monkeypatch):
    monkeypatch.setattr(normalisation, "CHUNK_BYTES", 1000)  # several bands
    model = network()
    model.normalisation = KINDS[kind]
    random = np.random.default_rng(0)
    low, high = {"uint8": (0, 256), "bool": (0, 2)}.get(dtype, (0, 4000))
    image = random.integers(low, high, (2, 2, 30, 21)).astype(dtype)
    image[1, 0] = image[1, 0, 0, 0]  # a constant channel
    wanted = model.predict(expected(kind, image).float())
    assert_close_relative(model.predict(torch.from_numpy(image)), wanted, FLOAT32)
    fast = uf.optimize(model)
    for entry in (lambda: fast.predict(torch.from_numpy(image)), lambda: uf.predict_tiled(fast, image, tile=32)):
        assert_close_relative(entry(), wanted, FLOAT32)
    assert_close_relative(uf.predict_tiled(model, image, tile=32), wanted, FLOAT32)
    in_tiles = uf.predict_tiled(model, expected(kind, image).float(), tile=16)
    assert_close_relative(uf.predict_tiled(model, torch.from_numpy(image), tile=16), in_tiles, FLOAT32)
    for other in (
        copy.deepcopy(model),
        uf.Network.from_config(model.config),
        model.prune(1),
        uf.load_optimized(fast.state_dict()),
    ):
        assert getattr(other, "network", other).normalisation == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_keeps_it_and_says_so(kind, tmp_path):
    pytest.importorskip("safetensors", reason="the format of the folder")
    model = network()
    model.normalisation = KINDS[kind]
    model.save_pretrained(tmp_path)
    assert uf.from_pretrained(tmp_path).normalisation == KINDS[kind]
    card = (tmp_path / "README.md").read_text()
    assert {"image": "mean 0", "dataset": "less the mean [0.3, 0.5]", "window": "clipped to -100 to 300"}[kind] in card


def test_an_image_file_is_read_by_bands(monkeypatch, tmp_path):
    """Neither statistics nor tiles ask for more of a mapped file than a band or a tile."""
    monkeypatch.setattr(normalisation, "CHUNK_BYTES", 16 * 2 * 100 * 8)
    model = network()
    model.normalisation = uf.Normalisation()
    image = np.random.default_rng(0).integers(0, 256, (1, 2, 90, 100)).astype(np.uint8)
    np.save(tmp_path / "image.npy", image)
    stored, seen = np.load(tmp_path / "image.npy", mmap_mode="r"), []

    class Sliced:
        shape, dtype = stored.shape, stored.dtype

        def __getitem__(self, where):
            seen.append(stored[where].size)
            return stored[where]

    found = uf.predict_tiled(model, Sliced(), tile=16)
    assert max(seen) == 16 * 2 * 100 and torch.equal(found, uf.predict_tiled(model, image, tile=16))


def test_a_network_without_one_refuses_whole_numbers():
    model, image = network(), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    says = r"whole numbers \(.*uint8\), and this network carries no normalisation: give floating-point values prepared as"
    for entry in (model.predict, uf.optimize(model).predict, lambda x: uf.predict_tiled(model, x)):
        with pytest.raises(TypeError, match=says):
            entry(image)
    with pytest.raises(TypeError, match=says):
        uf.predict_tiled(model, image.numpy())
    assert "normalisation" not in model.config
    model.normalisation = uf.Normalisation("dataset", (0.5,), (0.1,))
    with pytest.raises(ValueError, match=r"is for 1 channel\(s\), the image has 2"):
        model.predict(image)


WRONG = [
    ("other",), ("image", (1.0,), (1.0,)), ("dataset",), ("dataset", (0.0,), (0.0,)), ("dataset", (0.0,), (1.0, 1.0)),
    ("dataset", ("a",), (1.0,)), ("dataset", (float("nan"),), (1.0,)), ("window", (), (), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_numbers_that_do_not_fit(arguments):
    with pytest.raises(InputError):
        uf.Normalisation(*arguments)
    with pytest.raises(InputError):
        uf.Normalisation.from_config({"kind": "image", "more": 1})


def test_statistics_of_a_data_set_train_and_predict(tmp_path):
    """Mean and standard deviation over all pixels; samples, network and checkpoint have them, and predictions agree."""
    data = write_nuclei(tmp_path / "data", count=3)
    found, _ = find_samples(data)
    values = np.stack([read_values(sample.image) for sample in found])
    given = samples.dataset_normalisation(found)
    assert given.mean == pytest.approx([values.mean()]) and given.std == pytest.approx([values.std()])
    prepared = samples.with_normalisation(found, given)
    np.testing.assert_allclose(prepared[0].load()[0], (values[0] - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)
    model = build(uf.UNetPlusPlus, 1, 1, features=(2, 3))
    trainer = Trainer(model, Patches(prepared, 16, 1, 0), prepared[:1], Recipe(epochs=1, batch_size=3), tmp_path)
    trainer.fit(progress=False)
    again, _ = checkpoint.load_model(tmp_path / "best.pt")
    assert again.normalisation == model.normalisation == given
    stored = (values[0] * 255).round().astype(np.uint8)[None]
    assert_close_relative(
        again.predict(torch.from_numpy(stored)), model.predict(torch.from_numpy(prepared[0].load()[0])[None]), FLOAT32
    )
    with pytest.raises(InputError, match="is prepared as its task prescribes"):
        samples.dataset_normalisation([SliceSample("a", "a", data, data, 0)])
    flat = replace(samples.ArraySample("a", np.ones((1, 4, 4), np.float32), np.ones((1, 4, 4))))
    with pytest.raises(InputError, match="a channel is constant"):
        samples.dataset_normalisation([flat])


def test_the_command_python_and_older_checkpoints_agree(tmp_path):
    """A network that `train` made gives the command's masks for the bytes of a picture; one that carries nothing as well."""
    data = write_nuclei(tmp_path / "data")
    network = ("--features", "4,8", "--patch", "16", "--epochs", "1", "--device", "cpu")
    assert run("train", "--data", data, "--out", tmp_path / "run", *network) == 0
    picture, best = data / "images/cell1.png", tmp_path / "run/best.pt"
    assert run("predict", "--checkpoint", best, "--images", picture, "--out", tmp_path / "out", "--device", "cpu") == 0
    wanted = read_mask(tmp_path / "out/masks/nuclei/cell1.png")
    assert 0 < wanted.mean() < 1
    content = torch.load(best, weights_only=True)
    assert content["config"].pop("normalisation") == {"kind": "image"}
    torch.save(content, tmp_path / "older.pt")
    stored = (read_values(picture) * 255).round().astype(np.uint8)
    for path in (best, tmp_path / "older.pt"):
        model, _ = checkpoint.load_model(path)
        for image in (stored, stored.astype(np.int64)):
            assert np.array_equal(uf.predict_tiled(model, image[None], tile=48)[0, 0].numpy() > 0.5, wanted)
    del content["about"]["prepare"]
    torch.save(content, tmp_path / "other.pt")
    model, _ = checkpoint.load_model(tmp_path / "other.pt")
    assert model.normalisation is None
    floats = torch.from_numpy(read_normalised(picture))[None]
    assert np.array_equal(model.predict(floats)[0, 0].numpy() > 0.5, wanted)
