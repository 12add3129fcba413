"""UNet++ over timm's encoders, where timm is installed: names, weights, pruning, checkpoints, smp's names, the command."""

from __future__ import annotations

import pytest
import torch
from support import cpu_kernels
from support.command_line import fails, run
from support.folders import write_nuclei
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from support.peer_libraries import library

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.training.checkpoint import load_model, save_checkpoint

DECODER = (16, 12, 10, 8, 6)


@pytest.fixture(scope="module", autouse=True)
def timm():
    return library("timm")


def over(name: str, depth: int = 5, channels: int = 3, **options):
    options = {"deep_supervision": True, "decoder_channels": DECODER, **options}
    return build(lambda: uf.UNetPlusPlus(channels, 2, encoder=name, encoder_depth=depth, **options))


@pytest.mark.parametrize(("name", "depth", "channels"), [
    ("resnet18", 5, 1), ("resnet18", 3, 3), ("efficientnet_b0", 5, 4), ("densenet121", 3, 3),
    ("mobilenetv3_small_050", 4, 3), ("convnext_atto", 5, 3), ("convnext_atto", 4, 1),
])  # fmt: skip
def test_pruned_to_the_stages_of_the_encoder(timm, name, depth, channels):
    """What is left of the encoder is as large as timm makes one with fewer maps, or smaller; its head keeps every bit."""
    model = over(name, depth, channels).eval()
    side = 2**depth
    x = make_input(1, channels, side, 2 * side)
    with torch.no_grad():
        heads = model(x)
        assert [tuple(head.shape) for head in heads] == [(1, 2, side, 2 * side)] * (depth - 1)
        for level in {1, depth - 2}:
            small = model.prune(level)
            assert not small.encoder.remark and torch.equal(small(x), heads[level - 1])
            if cpu_kernels.has_library():  # by the kernels too
                model.backend = small.backend = "cpu"
                assert torch.equal(small(x), model(x)[level - 1])
                model.backend = small.backend = "auto"
            least = make_input(1, channels, small.multiple, small.multiple)
            assert small(least).shape == (1, 2, small.multiple, small.multiple)
            fewer = over(name, level + 1, channels)
            assert set(small.encoder.state_dict()) == set(fewer.encoder.state_dict())
            assert uf.parameter_count(small.encoder) < uf.parameter_count(model.encoder)
            assert small.gflop((64, 64)) < model.gflop((64, 64))


def test_names_that_timm_does_not_know(timm):
    with pytest.raises(InputError, match="timm has no model 'resnet43': did you mean 'resnet"):
        uf.UNetPlusPlus(encoder="resnet43")
    with pytest.raises(InputError, match="timm has no model 'efficientnet-b0': did you mean 'efficientnet_b0'"):
        uf.UNetPlusPlus(encoder="efficientnet-b0")
    with pytest.raises(InputError, match="timm gives no 6 maps of 'convnext_atto'"):
        uf.UNetPlusPlus(encoder="convnext_atto", encoder_depth=6, decoder_channels=(8,) * 6)


def test_weights_that_cannot_be_had(timm, monkeypatch):
    make = timm.create_model

    def offline(*args, pretrained, **options):
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")
        return make(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"the ImageNet weights of 'resnet18' cannot be had \(We couldn't connect to .*"
                       r"give a file, encoder_weights='weights.pth', or None"):  # fmt: skip
        uf.UNetPlusPlus(encoder="resnet18", encoder_weights="imagenet")


def test_weights_of_a_whole_classifier(timm, tmp_path):
    path = tmp_path / "weights.pth"
    for name, channels in (("resnet18", 1), ("densenet121", 3)):
        classifier = build(timm.create_model, name, pretrained=False, num_classes=3)
        torch.save(classifier.state_dict(), path)
        model = uf.UNetPlusPlus(channels, encoder=name, encoder_depth=3, encoder_weights=path, decoder_channels=DECODER)
        theirs = {key.replace("features.", "features_"): value for key, value in classifier.state_dict().items()}
        mine = model.encoder.body.state_dict()
        assert len(mine) > 30 and all(
            torch.equal(value, theirs[key]) for key, value in mine.items() if key != "conv1.weight"
        )
    classifier, x = build(timm.create_model, "resnet18", pretrained=False).eval(), make_input(1, 1, 64, 64)
    torch.save(classifier.state_dict(), path)
    model = uf.UNetPlusPlus(1, encoder="resnet18", encoder_weights=path, decoder_channels=DECODER)
    maps = classifier.forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
    assert_close_relative(model.eval().maps(x)[-1], maps[-1], FLOAT32)


def test_a_checkpoint_names_the_encoder(tmp_path):
    model = over("resnet18", 3, norm="instance", act=("leaky_relu", {"negative_slope": 0.1})).eval().freeze_encoder()
    for number, network in enumerate((model, model.prune(1))):
        save_checkpoint(tmp_path / "one.pt", {"config": network.config, "model": network.state_dict()})
        again, _ = load_model(tmp_path / "one.pt")
        x = make_input(1, 3, 20, 30)
        assert torch.equal(again.predict(x), network.predict(x)), number
        assert again.config == network.config and not any(p.requires_grad for p in again.encoder.parameters())


def test_the_names_of_smp():
    smp = library("segmentation_models_pytorch")
    model = over("resnet18").eval()
    with pytest.raises(ValueError, match=r"which has one head: prune\(level\) it first"):
        uf.to_state_dict(model, "smp")
    starts_lower = over("convnext_atto").eval()  # its first map is at 1/4
    for whole, name, level, widths in (
        (model, "tu-resnet18", 4, DECODER), (model, "tu-resnet18", 2, (64, 64, 6)),
        (starts_lower, "tu-convnext_atto", 4, DECODER), (starts_lower, "tu-convnext_atto", 2, (40, 8, 6)),
    ):  # fmt: skip
        small = whole.prune(level)
        theirs = smp.UnetPlusPlus(
            name, encoder_weights=None, classes=2, encoder_depth=level + 1, decoder_channels=widths
        ).eval()
        theirs.load_state_dict(uf.to_state_dict(small, "smp"))
        x = make_input(1, 3, 64, 64)
        assert_close_relative(theirs(x), small(x), FLOAT32)
        assert_close_relative(uf.convert(theirs)(x), small(x), FLOAT32)


def test_the_command_trains_resumes_and_predicts(tmp_path, capsys):
    folder, out = write_nuclei(tmp_path / "data", count=3), tmp_path / "out"
    network = ("--encoder", "resnet18", "--encoder-depth", "3", "--decoder-channels", "8,6,4", "--freeze-encoder")
    train = ("train", "--data", folder, "--out", out, "--patch", "32", "--batch-size", "2", "--device", "cpu", *network)
    assert run(*train, "--epochs", "1") == 0
    assert "unet++ over resnet18: " in capsys.readouterr().out
    assert run(*train, "--epochs", "2", "--resume") == 0
    model, _ = load_model(out / "last.pt")
    assert model.deep_supervision and model.encoder.name == "resnet18" and model.encoder_frozen
    predict = ("predict", "--checkpoint", out / "last.pt", "--images", folder / "images", "--out", tmp_path / "p")
    for more in ((), ("--mode", "fast", "--level", "1")):
        assert run(*predict, *more) == 0
    assert "3 image(s)" in capsys.readouterr().out
    other = tmp_path / "other"
    wrong = {
        ("--patch", "36"): "--patch must be a positive multiple of 8 for the encoder resnet18, not 36",
        ("--features", "4,8"): "--encoder does not go with --features",
        ("--model", "unet"): "--encoder does not go with --arch unet",
        ("--reproducible",): "--reproducible does not go with --encoder",
        ("--encoder-weights", "no.pth"): "no.pth does not exist",
        ("--encoder", "resnet43"): "timm has no model 'resnet43'",
    }
    for more, says in wrong.items():
        assert says in fails(capsys, *train[:4], other, *train[5:], *more)
    alone = ("train", "--data", folder, "--out", other, "--encoder-depth", "3")
    assert "--encoder-depth needs --encoder" in fails(capsys, *alone)
