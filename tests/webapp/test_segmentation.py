"""What the page computes: models of every kind, files of every kind, and the events, without gradio."""

from __future__ import annotations

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import fails
from support.medical_files import write_nifti

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.images import STANDARD, read_image, standardise
from unetpp_fast.data.resampling import resampled
from unetpp_fast.experiments import demo
from unetpp_fast.training.checkpoint import save_checkpoint
from unetpp_fast.webapp import interface, models, segmentation

CPU = torch.device("cpu")


def small(channels: int = 1, classes: int = 1, exclusive: bool = False, dims: int = 2) -> models.Model:
    torch.manual_seed(0)
    network = uf.UNetPlusPlus(channels, classes, features=(3, 4, 5), deep_supervision=True, spatial_dims=dims)
    network.exclusive, network.normalisation = exclusive, STANDARD
    names = [f"class {index}" for index in range(classes)]
    about = {"classes": names, "exclusive": exclusive, "palette": [[index, 2, 3] for index in range(classes)]}
    return models._model("small", [("small", network, {"about": about})], "float32")


def picture(path, shape, dtype=np.uint8):
    Image.fromarray(np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)).save(path)
    return path


def test_masks_are_those_of_predict(tmp_path):
    model, path = small(), picture(tmp_path / "a.png", (21, 30))
    opened = segmentation.open_file(model, path)
    image = torch.from_numpy(standardise(read_image(path)))[None]
    for mode, level in (("fast", 1), ("accurate", 2)):
        expected = model.network.predict(image, mode=mode, level=level)[0].numpy()
        np.testing.assert_allclose(opened.probabilities(mode, level), expected, atol=1e-6)
        assert np.array_equal(opened.mask(mode, level), (expected[0] > 0.5) * np.uint8(255))
        assert opened.overlay(mode, level).shape == (21, 30, 3) and opened.times[mode, level][0] > 0
    assert opened.planes == 1


@pytest.mark.parametrize(("channels", "shape"), [(3, (21, 30)), (1, (21, 30, 3))], ids=["grey", "colour"])
def test_channels_are_made_to_fit_and_said_so(tmp_path, channels, shape):
    opened = segmentation.open_file(small(channels), picture(tmp_path / "a.png", shape))
    assert ("repeated" in opened.note) == (channels == 3) and opened.mask("fast", 1).shape == (21, 30)
    values = np.asarray(Image.open(tmp_path / "a.png"), np.float32) / 255
    expected = np.stack([values] * 3) if channels == 3 else values.mean(axis=2)[None]
    np.testing.assert_allclose(opened.image(), expected if channels == 1 else expected[:3], atol=1e-6)


def test_planes_of_a_stack_and_of_a_volume(tmp_path):
    values = np.random.default_rng(0).random((8, 12, 16), np.float32)
    np.save(tmp_path / "v.npy", values)
    stack = segmentation.open_file(small(), tmp_path / "v.npy")
    volume = segmentation.open_file(small(dims=3), tmp_path / "v.npy")
    assert stack.planes == volume.planes == 8
    for opened in (stack, volume):
        assert opened.mask("fast", 2, 5).shape == (12, 16)
        np.testing.assert_allclose(opened.image(5)[0], values[5], atol=1e-6)
    assert len(stack.kept) == 1 and next(iter(volume.kept.values())).shape == (1, 8, 12, 16)


def test_exclusive_classes_have_their_colours(tmp_path):
    opened = segmentation.open_file(small(classes=3, exclusive=True), picture(tmp_path / "a.png", (16, 16)))
    label = opened.probabilities("accurate", 2).argmax(axis=0)
    mask = opened.mask("accurate", 2)
    assert opened.model.classes == ("class 1", "class 2")
    assert np.array_equal(mask[..., 0], np.where(label > 0, label, 0)) and (mask[..., 1][label > 0] == 2).all()


def test_a_large_image_is_predicted_in_tiles_and_drawn_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "WHOLE_PIXELS", 100)
    monkeypatch.setattr(segmentation, "SHOWN", 20)
    model, path = small(), picture(tmp_path / "a.png", (48, 64))
    opened = segmentation.open_file(model, path)
    expected = model.network.predict(torch.from_numpy(standardise(read_image(path)))[None], mode="fast", level=2)[0].numpy()
    np.testing.assert_allclose(opened.probabilities("fast", 2), expected, atol=1e-5)
    assert opened.overlay("fast", 2).shape == (12, 16, 3) and opened.mask("fast", 2).shape == (48, 64)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\nnonsense", "^given.png cannot be read"),
        ("a.txt", b"x", "unknown format"),
        ("a.npy", None, "^given.npy holds NaN"),
    ],
)
def test_a_bad_file_is_named_as_it_was_given(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content) if content else np.save(path, np.full((16, 16), np.nan, np.float32))
    with pytest.raises(InputError, match=says):
        segmentation.open_file(small(), path, f"given{path.suffix}").probabilities("fast", 1)


def test_models_come_from_a_run_a_file_and_a_saved_folder(tmp_path):
    network = small().network
    save_checkpoint(tmp_path / "run/best.pt", {"config": network.config, "model": network.state_dict(), "about": {}})
    for place in (tmp_path / "run", tmp_path / "run/best.pt"):
        assert models.load([str(place)], CPU).levels == (1, 2)
    pytest.importorskip("safetensors")
    network.save_pretrained(tmp_path / "saved")
    assert models.load([str(tmp_path / "saved")], CPU).describe().endswith("heads at L1, L2; cpu, float32")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/best.pt").unlink()
    (tmp_path / "run/config.json").write_text("{}")  # as `train` writes it, of its settings
    for place, says in (("empty", "holds no best.pt"), ("run", "holds no best.pt"), ("none.pt", "does not exist")):
        with pytest.raises(InputError, match=says):
            models.load([str(tmp_path / place)], CPU)


def write_folds(folder, *depths):
    """A cross-validation of networks with so many levels below the first, and heads at all."""
    for number, depth in enumerate(depths):
        torch.manual_seed(number)
        network = uf.UNetPlusPlus(1, 1, features=(3, 4, 5, 6)[: depth + 1], deep_supervision=True)
        content = {"config": network.config, "model": network.state_dict(), "about": {}}
        save_checkpoint(folder / f"fold{number}/best.pt", content)
    return folder


def test_a_cross_validation_is_the_mean_of_its_folds(tmp_path):
    folder, path = write_folds(tmp_path / "cv", 2, 2, 3), picture(tmp_path / "a.png", (21, 30))
    model = models.load([str(folder)], CPU)
    assert "cv, the mean of 3 networks (fold0, fold1, fold2):" in model.describe() and model.levels == (1, 2)
    opened, image = segmentation.open_file(model, path), torch.from_numpy(standardise(read_image(path)))[None]
    for mode, level in (("fast", 1), ("accurate", 2)):
        each = torch.stack([network.predict(image, mode=mode, level=level)[0] for _, network in model.members])
        np.testing.assert_allclose(opened.probabilities(mode, level), each.mean(dim=0), atol=1e-6)
        apart = each.amax(dim=0) - each.amin(dim=0)
        np.testing.assert_allclose(opened.disagreement(mode, level), apart[0], atol=1e-6)
        assert len(opened.times[mode, level]) == 3 and opened.heat(mode, level).shape == (21, 30, 3)
    assert model.parameters(1) == sum(uf.parameter_count(network.prune(1)) for _, network in model.members)


def test_several_models_are_named_by_their_places(tmp_path):
    one, two = (str(write_folds(tmp_path / name, 2, 2)) for name in ("a", "b"))
    model = models.load([one, f"{two}/fold1/best.pt"], CPU)
    assert [name for name, _ in model.members] == [f"{one}/fold0", f"{one}/fold1", f"{two}/fold1/best.pt"]
    assert model.name == "2 models"
    content = {"config": small(3).network.config, "model": small(3).network.state_dict(), "about": {}}
    save_checkpoint(tmp_path / "colour.pt", content)
    with pytest.raises(InputError, match="different channels"):
        models.load([one, str(tmp_path / "colour.pt")], CPU)
    lone = uf.UNetPlusPlus(1, 1, features=(3, 4, 5, 6))
    save_checkpoint(tmp_path / "lone.pt", {"config": lone.config, "model": lone.state_dict(), "about": {}})
    with pytest.raises(InputError, match="no level in common"):
        models.load([one, str(tmp_path / "lone.pt")], CPU)


def test_a_visit_to_several_models(tmp_path):
    model = models.load([str(write_folds(tmp_path / "cv", 2, 2))], CPU)
    app = interface.App(model, CPU, "float32")
    session = app.open(app.begin(), str(picture(tmp_path / "a.png", (16, 24))))
    session, masks, mask, table, _ = app.look(session, 2, "fast", 0)
    assert "<td>fold1</td>" in table and table.count(" ms") == 4 and "in sum" in table
    session, heat, same, _, line = app.look(session, 2, "fast", 0, interface.DISAGREEMENT)
    assert np.array_equal(mask, same) and not np.array_equal(masks, heat) and "where the members' probabilities lie" in line
    session.model = small()  # chosen while the page still asks for what only several models have
    session = app.open(session, str(tmp_path / "a.png"))
    assert np.array_equal(app.look(session, 2, "fast", 0, interface.DISAGREEMENT)[1], session.opened.overlay("fast", 2))


def test_the_events_of_a_visit(tmp_path, monkeypatch):
    app = interface.App(None, CPU, "float32")
    session = app.open(app.begin(), str(picture(tmp_path / "a.png", (16, 24))))
    assert "Choose a model" in session.problem and interface.times(session) == ""
    monkeypatch.setattr(models, "train_on_sample", lambda device: small())
    session = app.train(session)
    session, overlay, mask, table, line = app.look(session, 2, "fast", 0)
    assert overlay.shape == (16, 24, 3) and mask.shape == (16, 24) and table.count(" ms") == 1 and "a.png, 16 x 24" in line
    assert list(app.measure(session))[-1][1].count(" ms") == 4
    session = app.choose_model(session, "")
    assert "give the folder of a training" in interface.status(session) and 'role="alert"' in interface.status(session)
    assert app.look(session, 2, "fast", 0)[1] is not None
    closed = interface.App(None, CPU, "float32", choose=False)
    assert "one model" in closed.choose_model(closed.begin(), str(tmp_path)).problem


def test_the_small_model_learns_the_sample(monkeypatch):
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 1)
    model = models.train_on_sample(CPU, epochs=1)
    assert model.classes == ("nuclei",) and model.network.normalisation == STANDARD and not model.network.training


@pytest.mark.parametrize("error", [OSError("taken"), OverflowError("bind(): port must be 0-65535.")], ids=["taken", "none"])
def test_a_port_that_cannot_be_used(monkeypatch, error):
    class Page:
        def queue(self):
            return self

        def launch(self, **options):
            raise error

    monkeypatch.setattr(interface, "build", lambda app: Page())
    monkeypatch.setattr(interface, "need", lambda *names: MagicMock())
    with pytest.raises(InputError, match=r"the port 99999 of .* cannot be used: choose another --port"):
        interface.launch(interface.App(None, CPU, "float32"), "127.0.0.1", 99999)


def test_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'unetpp_fast[app]'" in fails(capsys, "app", "--device", "cpu")


def test_a_volume_is_resampled_to_the_spacing_of_the_network_and_back(tmp_path):
    path = write_nifti(tmp_path / "v.nii", np.random.default_rng(0).normal(size=(16, 12, 8)).astype(np.float32))
    model = small(dims=3)
    model.network.spacing = (1.25, 0.8, 0.7)  # of 2.5, 0.8 and 0.7
    opened = segmentation.open_file(model, path)
    values = np.asarray(opened.source.values, np.float64)[None]
    fine = torch.from_numpy(resampled(standardise(values)[None], (16, 12, 16)))[None]
    expected = resampled(model.network.predict(fine, mode="fast", level=1).numpy(), (8, 12, 16))
    for plane in range(opened.planes):
        np.testing.assert_allclose(opened.probabilities("fast", 1, plane), expected[:, plane], atol=1e-5)
