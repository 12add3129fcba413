"""Models in `DataParallel`, `AveragedModel` and modules of other kinds: taken out, or one clear error."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input
from support.peer_models import NestedUNet
from torch import nn
from torch.optim.swa_utils import AveragedModel

import unetpp_fast as uf
from unetpp_fast.deployment.optimized import Optimized


def network() -> uf.Network:
    return build(uf.UNetPlusPlus, 2, 3, features=(3, 4), deep_supervision=True).eval()


class Lit(nn.Module):
    """As a Lightning module: what its own forward adds is not known."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net, self.loss = model, nn.BCEWithLogitsLoss()

    def forward(self, x):
        return self.net(x / 255)


WRAPPERS = {
    "AveragedModel": lambda model: AveragedModel(model).eval(),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(AveragedModel(model).eval()),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_wrappers_that_compute_the_same_are_taken_off(wrap) -> None:
    model, x = network(), make_input(1, 2, 8, 12)
    wrapped = wrap(model)
    assert_close_relative(uf.optimize(wrapped)(x), model(x), FLOAT32)
    assert_close_relative(uf.convert(wrapped)(x), model(x), FLOAT32)
    assert_close_relative(uf.predict_tiled(wrapped, x, tile=12), uf.predict_tiled(model, x, tile=12), FLOAT32)
    assert uf.explain(wrapped, x) == uf.explain(model, x)
    assert list(uf.backbone(wrapped)(x)) == ["0", "1"]
    peer = build(NestedUNet, 2, 2).eval()
    back = uf.to_state_dict(wrap(uf.convert(peer)), "nested-unet")
    assert all(torch.equal(back[name], value) for name, value in peer.state_dict().items())


@torch.no_grad()
def test_other_modules_around_a_model_are_one_clear_error() -> None:
    x, lit = make_input(1, 2, 8, 12), Lit(network())
    hooked = nn.DataParallel(network())
    hooked.register_forward_pre_hook(lambda module, arguments: (arguments[0] / 255,))
    for call in (
        lambda model: uf.explain(model, x),
        lambda model: uf.predict_tiled(model, x, tile=12),
        lambda model: uf.backbone(model),
        lambda model: uf.optimize(model),
        lambda model: uf.convert(model),
        lambda model: uf.tune(model, x),
    ):
        with pytest.raises((TypeError, ValueError), match=r"Lit.*: give its \.net"):
            call(lit)
        with pytest.raises(ValueError, match="this DataParallel has hooks: put them on the model inside it"):
            call(hooked)
    with pytest.raises(ValueError, match="this Lit cannot be written as a NestedUNet"):
        uf.to_state_dict(lit, "nested-unet")
    fast = uf.optimize(network())
    assert isinstance(fast, Optimized) and uf.predict_tiled(fast, x, tile=12).shape == (1, 3, 8, 12)
