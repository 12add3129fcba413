"""The weights of the paper's Keras code, as arrays and HDF5 files, against a plain computation of what Keras does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.fused_cases import assert_same_inference, assert_same_passes
from support.helpers import FLOAT64, assert_close_relative, make_input
from support.peer_models import keras_arrays, keras_forward

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError

HEADS = {"unet": ("output",), "unet++": ("output_4",), "unet++ 4 heads": ("output_1", "output_2", "output_3", "output_4")}


def image() -> torch.Tensor:
    return make_input(2, 2, 32, 16, dtype=torch.float64)


def arrays(kind: str = "unet++") -> dict[str, np.ndarray]:
    return keras_arrays(channels=2, classes=3, heads=HEADS[kind])


@pytest.mark.parametrize("kind", HEADS)
def test_probabilities_are_those_of_keras(kind: str) -> None:
    """The same maps with the channels first, a list if there are four heads; dropout as in the paper."""
    weights = {name: array.astype(np.float64) for name, array in arrays(kind).items()}
    ours = uf.convert(weights)
    assert ours.training and ours.options["dropout"] == 0.5
    expected = [map.movedim(-1, 1) for map in keras_forward(weights, image().movedim(1, -1), HEADS[kind])]
    outputs = ours.eval()(image())
    assert isinstance(outputs, list) == (len(expected) > 1)
    assert_close_relative(outputs if len(expected) > 1 else [outputs], expected, FLOAT64)
    assert_close_relative(ours.predict(image()), torch.stack(expected).mean(0), FLOAT64)


@pytest.mark.parametrize("kind", HEADS)
def test_round_trip(kind: str) -> None:
    weights = arrays(kind)
    back = uf.to_state_dict(uf.convert(weights), "keras")
    assert set(back) == set(weights)
    for name, array in weights.items():
        assert isinstance(back[name], np.ndarray) and np.array_equal(back[name], array), name


def test_the_engine_runs_it_and_gradients_agree() -> None:
    """The gradient of every weight is finite, and the engine's equals the reference's."""
    ours = uf.convert({name: array.astype(np.float64) for name, array in arrays().items()}, dropout=0.0)
    assert ours.structure is not None
    assert_same_passes(ours, image())
    assert_same_inference(ours.eval(), image())
    with torch.no_grad():
        assert ours(image()).requires_grad is False
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_our_own_paper_network_under_their_names() -> None:
    for name, heads in (("unet", ("output",)), ("unet++", ("output_4",))):
        with torch.device("meta"):
            expected = {key: value.shape for key, value in keras_arrays((32, 64, 128, 256, 512), heads=heads).items()}
        mine = uf.to_state_dict(uf.from_paper(name), "keras")
        assert {key: value.shape for key, value in mine.items()} == expected
        assert sum(value.size for value in mine.values()) == {"unet": 7_759_521, "unet++": 9_041_601}[name]


@pytest.mark.parametrize("layout", ["save_weights", "save"])
def test_a_file(tmp_path: Path, layout: str) -> None:
    """As written by Keras 2: one group per layer, with the weights under a scope of the same name."""
    h5py = pytest.importorskip("h5py", reason="h5py, of the extra 'keras', is not installed")
    weights = arrays()
    with h5py.File(tmp_path / "w.h5", "w") as file:
        root = file if layout == "save_weights" else file.create_group("model_weights")
        root.create_group("dp11_1")  # dropout has a group without weights
        for name, array in weights.items():
            layer, weight = name.split("/")
            root.create_dataset(f"{layer}/{layer}/{weight}", data=array)
        if layout == "save":
            file.create_dataset("optimizer_weights/Adam/iterations:0", data=np.int64(3))
    ours = uf.convert(tmp_path / "w.h5")
    back = uf.to_state_dict(ours, "keras")
    assert all(np.array_equal(back[name], array) for name, array in weights.items())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py, of the extra 'keras', is not installed")
    (tmp_path / "w.h5").write_bytes(b"not HDF5")
    for path in (tmp_path / "w.h5", tmp_path / "absent.h5"):
        with pytest.raises(InputError, match="cannot be read as HDF5"):
            uf.convert(path)
    with pytest.raises(ValueError, match=r"is not an HDF5 file of Keras, nor a checkpoint \(\.pt, "):
        uf.convert(tmp_path / "model.onnx")


def test_names_without_the_ending_are_accepted() -> None:
    weights = arrays()
    short = {name.removesuffix(":0"): array for name, array in weights.items()}
    assert set(uf.to_state_dict(uf.convert(short), "keras")) == set(weights)


def test_what_keras_cannot_hold() -> None:
    with pytest.raises(ValueError, match="which has no 'running_mean'"):
        uf.to_state_dict(uf.UNetPlusPlus(1, features=(2, 3, 4, 5, 6)), "keras")
    with pytest.raises(ValueError, match=r"it has no conv23_2/kernel:0"):
        uf.convert({name: array for name, array in arrays().items() if name != "conv23_2/kernel:0"})
