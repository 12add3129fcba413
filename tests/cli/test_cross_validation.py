"""Cross-validation: folds and their file, one training per fold, and networks that predict together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import fails, run
from support.folders import write_nuclei
from support.helpers import build, make_input

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.data.folds import make_folds, read_folds, write_folds
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.training.checkpoint import load_checkpoint, load_ensemble, load_model

SMALL = ("--features", "4,8", "--patch", "32", "--patches-per-image", "1", "--device", "cpu", "--epochs", "1")


class Of(ArraySample):
    """A sample of a patient, who is the first letter of its name."""

    @property
    def group(self) -> str:
        return self.name[0]


def samples(*names: str) -> list[Of]:
    return [Of(name, np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), bool)) for name in names]


def test_each_sample_validates_once_and_patients_stay_together():
    names = ["a1", "a2", "b1", "c1", "c2", "d1", "e1"]
    folds = make_folds(samples(*names), 3, seed=0)
    assert sorted(name for fold in folds for name in fold["val"]) == names
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == names
        assert not {name[0] for name in fold["train"]} & {name[0] for name in fold["val"]}
        assert 1 <= len({name[0] for name in fold["val"]}) <= 2
    assert folds == make_folds(samples(*names[::-1]), 3, seed=0) != make_folds(samples(*names), 3, seed=1)


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ([{"train": ["a1"], "val": ["b1"]}], "holds 1 folds: use --folds 1"),
        ([{"train": ["a1"], "val": ["x1"]}] * 2, "fold 0 of .* names x1, which the data does not hold"),
        ([{"train": ["a1"], "val": ["a1"]}] * 2, "has a1 on both sides"),
        ([{"train": ["a1"], "val": []}] * 2, "has an empty side"),
        ({"train": []}, "must be a list of folds"),
    ],
)
def test_a_file_of_folds_that_does_not_fit_says_why(tmp_path, folds, says):
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    with pytest.raises(InputError, match=says):
        read_folds(tmp_path / "folds.json", samples("a1", "b1"), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), count=4)


def command(folder: Path, out: Path, *more: str) -> tuple:
    return ("train", "--data", folder, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def folds(folder, tmp_path_factory) -> Path:
    """A cross-validation with two folds, normalised by the data set."""
    out = tmp_path_factory.mktemp("runs") / "cv"
    assert run(*command(folder, out, "--folds", "2", "--normalise", "dataset")) == 0
    return out


def test_every_fold_is_a_training_of_its_own(folder, folds, tmp_path, capsys):
    kept = json.loads((folds / "folds.json").read_text())
    for number, fold in enumerate(kept):
        about = load_checkpoint(folds / f"fold{number}/best.pt")["about"]
        assert about["training"] == fold["train"] and about["validation"] == fold["val"]
    one = command(folder, tmp_path / "cv", "--folds", "2", "--normalise", "dataset", "--fold", "1")
    assert run(*one) == 0 and sorted(path.name for path in (tmp_path / "cv").iterdir()) == ["fold1", "folds.json"]
    assert json.loads((tmp_path / "cv/folds.json").read_text()) == kept
    weights = [load_model(place / "fold1/last.pt")[0].state_dict() for place in (folds, tmp_path / "cv")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "already holds a training" in fails(capsys, *one)
    rest = command(folder, tmp_path / "cv", "--folds", "2", "--normalise", "dataset", "--resume")
    assert run(*rest) == 0  # trains fold 0, and finds fold 1 at its end
    assert "2 folds, best validation iou: 0." in capsys.readouterr().out
    networks = [load_model(folds / f"fold{number}/best.pt")[0] for number in (0, 1)]
    assert networks[0].normalisation == networks[1].normalisation and networks[0].normalisation.kind == "dataset"


def test_folds_of_one_s_own_are_used(folder, tmp_path):
    (tmp_path / "cv").mkdir()
    own = [{"train": ["cell0"], "val": ["cell1"]}, {"train": ["cell1", "cell2"], "val": ["cell0"]}]
    write_folds(tmp_path / "cv/folds.json", own)
    assert run(*command(folder, tmp_path / "cv", "--folds", "2", "--fold", "1")) == 0
    assert load_checkpoint(tmp_path / "cv/fold1/last.pt")["about"]["training"] == ["cell1", "cell2"]


def test_the_folds_predict_together(folder, folds, tmp_path):
    """The folder, its checkpoints, and the mean of what each predicts are the same."""
    checkpoints = [folds / "fold0/best.pt", folds / "fold1/best.pt"]
    for name, places in {"folder": [folds], "files": checkpoints, "0": checkpoints[:1], "1": checkpoints[1:]}.items():
        out = ("--out", tmp_path / name, "--probabilities", "--flips", "--device", "cpu")
        assert run("predict", "--checkpoint", *places, "--images", folder / "images", *out) == 0
    read = lambda name: np.array(Image.open(tmp_path / name / "probabilities/nuclei/cell0.png"), np.float64)  # noqa: E731
    assert np.array_equal(read("folder"), read("files"))
    assert not np.array_equal(read("0"), read("1"))
    assert np.abs(read("folder") - (read("0") + read("1")) / 2).max() <= 1
    mask = np.array(Image.open(tmp_path / "folder/masks/nuclei/cell0.png")) > 0
    far = np.abs(read("folder") - 65535 / 2) > 1  # from the threshold, at which rounding decides
    assert far.any() and np.array_equal(mask[far], (read("folder") > 65535 / 2)[far])


def test_an_ensemble_is_the_mean_of_its_members_of_any_size():
    torch.manual_seed(0)
    members = [build(uf.UNetPlusPlus, 1, 2, features=(3,) * depth) for depth in (2, 4)]
    ensemble = uf.Ensemble(members)
    assert ensemble.multiple == 8
    x = make_input(2, 1, 13, 21)
    expected = sum(member.predict(x) for member in members) / 2
    torch.testing.assert_close(ensemble.predict(x), expected)
    torch.testing.assert_close(uf.predict_tiled(ensemble, x), expected)
    torch.testing.assert_close(
        uf.predict_tiled(uf.Ensemble(members[:1]), x, tile=8), uf.predict_tiled(members[0], x, tile=8)
    )
    with pytest.raises(InputError, match="different classes cannot predict together: 2 and 1"):
        uf.Ensemble([members[0], build(uf.UNetPlusPlus, 1, 1, features=(3, 3))])


def test_a_fold_of_the_data_is_chosen(folder, tmp_path, capsys):
    """As nnU-Net's splits_final.json lists them; without --folds the run lies in --out itself."""
    shutil.copytree(folder, tmp_path / "data")
    names = sorted(path.stem for path in (folder / "images").iterdir())
    folds = [{"train": names[1:], "val": names[:1]}, {"train": names[:-1], "val": names[-1:]}]
    (tmp_path / "data/splits_final.json").write_text(json.dumps(folds))
    assert run(*command(tmp_path / "data", tmp_path / "out", "--fold", "1", "--epochs", "1")) == 0
    assert load_checkpoint(tmp_path / "out/best.pt")["about"]["validation"] == names[-1:]
    text = fails(capsys, *command(tmp_path / "data", tmp_path / "more", "--folds", "2"))
    assert "leave --folds out (--fold chooses one of its folds)" in text


def test_mistakes_are_one_line(folder, folds, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--fold needs --folds" in fails(capsys, *command(folder, out, "--fold", "1"))
    assert "--fold must be 0 to 1, not 2" in fails(capsys, *command(folder, out, "--folds", "2", "--fold", "2"))
    assert "needs at least 9 images" in fails(capsys, *command(folder, out, "--folds", "9"))
    assert "--folds must be at least 2" in fails(capsys, *command(folder, out, "--folds", "1"))
    assert "nothing to resume" in fails(capsys, *command(folder, out, "--folds", "2", "--resume"))
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no best\.pt and no fold\*/best\.pt: name a checkpoint"):
        load_ensemble([tmp_path / "empty"])
    assert run(*command(folder, tmp_path / "other")) == 0
    with pytest.raises(InputError, match="different ways to prepare images"):
        load_ensemble([folds, tmp_path / "other"])
