"""Networks saved as folders, and read back; the Hub is a stand-in."""

from __future__ import annotations

import json
import types

import pytest
import torch
from support.helpers import build, make_input

import unetpp_fast as uf
from unetpp_fast.common.errors import InputError
from unetpp_fast.models import pretrained

pytest.importorskip("safetensors", reason="the extra hub is not installed")


def network(**options):
    return build(uf.UNetPlusPlus, 2, 3, features=(3, 4, 5), act=("leaky_relu", {"negative_slope": 0.2}), **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_comes_back_from_a_folder(tmp_path, dtype):
    model, x = network(deep_supervision=True).to(dtype), make_input(1, 2, 8, 12, dtype=dtype)
    again = uf.from_pretrained(model.save_pretrained(tmp_path / "net"))
    assert again.config == json.loads(json.dumps(model.config)) and not again.training
    with torch.no_grad():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again(x), model(x), strict=True))


def test_a_name_is_asked_of_the_hub(tmp_path, monkeypatch):
    model = network()
    folder = model.save_pretrained(tmp_path / "net")
    hub = types.SimpleNamespace(snapshot_download=lambda name, **options: str(folder))
    need = pretrained.need
    monkeypatch.setattr(pretrained, "need", lambda name, extra: hub if name == "huggingface_hub" else need(name, extra))
    assert torch.equal(uf.from_pretrained("me/net").state_dict()["heads.x0_2.weight"], model.heads["x0_2"].weight)


def test_what_is_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="save to another folder"):
        network().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of something else"):
        uf.from_pretrained(tmp_path)


def test_an_upload_has_the_weights_and_the_figures_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("epoch,train_loss,val_iou\n1,0.5,0.6\n2,0.4,0.65\n3,0.3,0.61\n")
    sent = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **options):
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.update({path.name: path.read_bytes() for path in pretrained.Path(folder_path).iterdir()}, repo=repo_id)

    need = pretrained.need
    hub = types.SimpleNamespace(HfApi=Api)
    monkeypatch.setattr(pretrained, "need", lambda name, extra: hub if name == "huggingface_hub" else need(name, extra))
    network().push_to_hub("me/net", run=tmp_path)
    assert set(sent) == {"README.md", "config.json", "model.safetensors", "repo"} and sent["repo"] == "me/net"
    assert b"epoch 2 of 3" in sent["README.md"] and b"0.6500" in sent["README.md"]
