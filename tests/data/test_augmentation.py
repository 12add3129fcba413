"""Random changes of patches: the same for image and mask, determined by the seed, in 2D and 3D; wrong settings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import fails, run
from support.folders import write_nuclei

from unetpp_fast.common.errors import InputError
from unetpp_fast.data.augmentation import STRONG, Augmentation, read_spec
from unetpp_fast.data.patches import BatchLoader, Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.models.normalisation import Normalisation

pytest.importorskip("monai", reason="the extra 'augment' is not installed")
MOVES = [["Rand2DElastic", {**STRONG[2][0][1], "prob": 1.0}]]
MOVES_3D = [["Rand3DElastic", {**STRONG[3][0][1], "prob": 1.0}]]
PLAIN = Normalisation("window", window=(-1.0, 1.0))  # keeps values of -1 to 1


def sample_of(labels: np.ndarray, classes: int) -> ArraySample:
    """An image whose channels are the classes of its label map: 1 where a pixel is of the class, else -1."""
    one_hot = labels == np.arange(classes).reshape(-1, *[1] * labels.ndim)
    return ArraySample("labels", one_hot.astype(np.float32) * 2 - 1, one_hot, normalisation=PLAIN)


def blocks(side: int, dims: int) -> np.ndarray:
    """A label map of three classes in blocks."""
    return np.kron(np.random.default_rng(0).integers(0, 3, (side // 8,) * dims), np.ones((8,) * dims, int))


def test_a_patch_of_unlike_sides_is_read_with_the_margin_of_its_longest():
    """A turn brings in voxels from far beyond the thin side: hardly one comes from outside of what was read."""
    transform = Augmentation([["RandAffine", {"prob": 1.0, "rotate_range": [0.5, 0.3, 0.3]}]], 3, (8, 24, 16))
    assert transform.margin == 9
    around = np.ones((1, 8 + 18, 24 + 18, 16 + 18), np.float32)
    for seed in range(5):
        image, mask = transform(around, around > 0, (seed,))
        assert image.shape == mask.shape == (1, 8, 24, 16) and mask.mean() > 0.98


@pytest.mark.parametrize(("dims", "spec"), [(2, MOVES), (3, MOVES_3D)])
@pytest.mark.parametrize("outside", [None, 0])
def test_image_and_label_map_move_alike(dims, spec, outside):
    """Where the image is purely of one class, the label map has that class; outside of the image it has none, or the
    background."""
    side, patch = (64, 48) if dims == 2 else (32, 24)
    sample = sample_of(blocks(side, dims), 3)
    patches = Patches([sample], patch, 8, 0, augment=False, transform=Augmentation(spec, dims, patch), outside=outside)
    still = Patches([sample], patch, 8, 0, augment=False)
    emptied = 0
    for draw in range(8 if dims == 2 else 3):
        image, mask = (values.numpy() for values in patches[0, draw])
        assert image.shape == mask.shape == (3, *[patch] * dims) and set(np.unique(mask)) <= {0.0, 1.0}
        assert not np.array_equal(mask, still[0, draw][1].numpy())
        pure = image.max(axis=0) > 0.999
        assert pure.mean() > 0.3
        assert np.array_equal(image.argmax(axis=0)[pure], mask.argmax(axis=0)[pure]) and mask[:, pure].sum(axis=0).min() == 1
        inside = np.abs(image.sum(axis=0) + 1) < 1e-4  # 1 - 1 - 1, between pixels of different classes too
        assert (mask[:, inside].sum(axis=0) == 1).all() and inside.mean() > 0.5
        empty = (np.abs(image) < 1e-6).all(axis=0)  # zero, which no pixel of the image is
        emptied += empty.sum()
        assert (mask[:, empty].sum(axis=0) == (outside is not None)).all() and mask.sum(axis=0).max() == 1
        if outside is not None:
            assert (mask.sum(axis=0) == 1).all() and (mask[0, empty] == 1).all()
    assert emptied > 0


def test_a_patch_depends_only_on_seed_epoch_and_draw():
    """Also with worker processes and another number of threads."""
    sample = sample_of(blocks(64, 2), 3)
    make = lambda seed=0: Patches([sample], 32, 4, seed, transform=Augmentation(STRONG[2], 2, 32))  # noqa: E731
    one, other = make(), make()
    other[0, 0], other[3, 2]
    expected = [one[1, draw] for draw in range(4)]
    torch.set_num_threads(2)
    try:
        found = [other[1, draw] for draw in range(4)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    (images, masks), *_ = BatchLoader(make(), 1, pin=False).load([[(1, draw) for draw in range(4)]])
    for (a, b), (c, d), e, f in zip(expected, found, images, masks, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d) and torch.equal(a, e) and torch.equal(b, f)
    assert not torch.equal(expected[0][0], make(1)[1, 0][0]) and not torch.equal(expected[0][0], one[2, 0][0])


def test_the_image_alone_changes_in_brightness_and_noise():
    spec = [[name, {**settings, "prob": 1.0}] for name, settings in STRONG[2][1:]]
    spec += [["RandCoarseDropout", {"prob": 1.0, "holes": 2, "spatial_size": 4, "fill_value": 9}]]
    sample = sample_of(blocks(64, 2), 3)
    changed = Patches([sample], 32, 4, 0, augment=False, transform=Augmentation(spec, 2, 32))
    still = Patches([sample], 32, 4, 0, augment=False)
    for draw in range(4):
        assert torch.equal(changed[0, draw][1], still[0, draw][1])
        assert (changed[0, draw][0] != still[0, draw][0]).float().mean() > 0.99
    assert np.array_equal(changed.load(0)[0], sample.load()[0])  # what is cached stays as it is


def test_the_share_of_patches_holds_foreground():
    """Of every class alike, however rare; the background does not count, and an image without foreground is drawn from."""
    labels = np.zeros((64, 64), int)
    labels[:2, :2], labels[40:60, 40:60] = 1, 2
    sample, empty = sample_of(labels, 3), sample_of(np.zeros((64, 64), int), 3)
    count = 60
    patches = Patches([sample], 8, count, 0, foreground=1.0, background=0)
    masks = [patches[0, draw][1] for draw in range(count)]
    assert all(bool(mask[1:].any()) for mask in masks)
    assert 20 <= sum(bool(mask[1].any()) for mask in masks) <= 40
    places = {int(mask[2].sum()) for mask in masks}
    assert len(places) > 10  # the pixel is anywhere in the patch
    some = Patches([sample], 8, count, 0, foreground=0.3, background=0)
    holding = sum(bool(some[0, draw][1][1:].any()) for draw in range(count))
    assert 0.2 * count < holding < 0.8 * count
    assert Patches([empty], 8, 1, 0, foreground=1.0, background=0)[0, 0][1][0].all()
    with pytest.raises(InputError, match=r"between 0 and 1, not 1\.5"):
        Patches([sample], 8, 1, 0, foreground=1.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- RandAfine: {prob: 1}", r"no random transform 'RandAfine' of MONAI's; there are RandAffine"),
        ("- SpatialPad: {}", "no random transform 'SpatialPad'"),
        ("- Rand3DElastic: {sigma_range: [1, 2], magnitude_range: [1, 2]}", "is for 3D images: the data is 2D"),
        ("- RandAffine: {angle: 1}", "RandAffine cannot be used with {'angle': 1}: .*angle"),
        ("- RandAffine: {mode: bilinear}", "RandAffine gets its mode from the training"),
        ("- RandGridPatch: {patch_size: [4, 4]}", "RandGridPatch (changes the size|cannot be used)"),
        ("RandFlip", "must be a list of transforms such as '- RandAffine"),
        ("- RandFlip: 3", "the settings of RandFlip must be names with values, not 3"),
        ("- [", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, says):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Augmentation(read_spec(tmp_path / "a.yaml"), 2, 32)
    assert "\n" not in str(caught.value)


def test_a_file_s_transforms_are_used(tmp_path):
    """Those that MONAI resizes by its own modes too, and names without settings."""
    (tmp_path / "a.yaml").write_text("- RandZoom: {prob: 1, min_zoom: 0.5, max_zoom: 0.6}\n- RandGaussianNoise\n")
    example = (Path(__file__).parents[2] / "docs/training.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "docs.yaml").write_text(example)
    assert len(Augmentation(read_spec(tmp_path / "docs.yaml"), 2, 16).moving) == 2
    spec = read_spec(tmp_path / "a.yaml")
    assert spec == [["RandZoom", {"prob": 1, "min_zoom": 0.5, "max_zoom": 0.6}], ["RandGaussianNoise", {}]]
    for dims in (2, 3):
        patches = Patches(
            [sample_of(blocks(64 if dims == 2 else 32, dims), 3)], 16, 1, 0, transform=Augmentation(spec, dims, 16)
        )
        assert patches[0, 0][1].sum(dim=0).max() == 1


def test_a_run_is_resumed_with_the_same_patches_alone(tmp_path, capsys):
    folder = write_nuclei(tmp_path / "data", count=3)
    command = ("train", "--data", folder, "--out", tmp_path / "out", "--features", "4,8", "--patch", "32", "--device", "cpu")
    assert run(*command, "--epochs", "1", "--augment", "strong", "--foreground", "0.5") == 0
    for options, key in {
        ("--augment", "strong"): "foreground=0.5, now None",
        ("--foreground", "0.5"): "transforms set",
        ("--foreground", "0.5", "--augment", "none"): "flips=None, now False",
        ("--foreground", "0.5", "--augment", "strong", "--normalise", "dataset"): "another model",
    }.items():
        assert key in fails(capsys, *command, "--epochs", "2", "--resume", *options)


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, monkeypatch):
    folder = write_nuclei(tmp_path / "data", count=3)
    command = ("train", "--data", folder, "--out", tmp_path / "out", "--features", "4,8", "--patch", "32", "--device", "cpu")
    assert "give none, light, strong or a file" in fails(capsys, *command, "--augment", "hard")
    assert "between 0 and 1, not 2.0" in fails(capsys, *command, "--foreground", "2")
    for name in [name for name in sys.modules if name.split(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)
    assert "monai is missing: pip install 'unetpp_fast[augment]'" in fails(capsys, *command, "--augment", "strong")
    assert not Path(tmp_path / "out").exists()
