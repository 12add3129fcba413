"""What is checked before kernels are used, and how strictly."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_input

import unetpp_fast as uf
from unetpp_fast.execution import built, dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import tuning


def small() -> tuple[uf.Network, torch.Tensor]:
    torch.manual_seed(0)
    return uf.UNet(1, 1, features=(3, 4)), make_input(2, 1, 4, 6)


def test_a_slower_kernel_is_known_without_a_look_at_the_layers(monkeypatch):
    model, x = small()
    call = Call(model.eval(), x)
    slower = {"backend": "cpu", "right": True, "ratio": 0.5, "fused_ms": 2.0, "reference_ms": 1.0}
    monkeypatch.setattr(tuning, "verdict", lambda call: slower)
    monkeypatch.setattr(built, "facts", None)  # what `built.changed` calls of each layer
    assert dispatch.choose(call) == ("reference", "measured: the kernels take 2.00 of the reference's time")
    model.backend = "triton"
    with pytest.raises(TypeError, match="not callable"):
        dispatch.choose(call)


@pytest.mark.parametrize(("ratio", "name"), [(1.02, "reference"), (1.04, "cpu")])
def test_the_kernels_have_to_be_clearly_faster(ratio, name):
    verdict = {"backend": "cpu", "right": True, "ratio": ratio, "fused_ms": 1.0, "reference_ms": ratio}
    assert dispatch._by(verdict)[0] == name


@pytest.mark.parametrize("norm", [None, "batch"])
def test_only_a_network_with_norms_is_asked_whether_they_train(norm):
    model = uf.UNet(1, 1, features=(3, 4), norm=norm)
    call = Call(model.train(), make_input(2, 1, 4, 6))
    assert call.in_training == (norm == "batch") == (call._modules is not None)


def test_all_images_are_checked_on_a_gpu_as_far_as_memory_goes(monkeypatch):
    """The kernels for a large batch are not those for two images."""
    checked = tuning._checked([torch.empty(16, 1, 128, 128, device="meta")], 4)
    assert [x.shape[0] for (x,) in checked] == [16, 8, 2]
    assert [x.shape[0] for (x,) in tuning._checked([torch.empty(2, 1, 4, 4, device="meta")], 4)] == [2]
    ((part, half),) = tuning._checked([torch.empty(16, 1, 128, 256), torch.empty(16, 7, 64, 128)], 4)
    assert part.shape == (2, 1, 64, 64) and half.shape == (2, 7, 32, 32)
    seen, forward = [], tuning.reference.forward

    def limited(network, inputs):
        if inputs[0].dtype == torch.float64 and inputs[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, inputs)

    def kernels(network, inputs):
        seen.append(inputs[0].shape[0])
        return forward(network, inputs)

    monkeypatch.setattr(tuning.reference, "forward", limited)
    model, x = small()[0], make_input(5, 1, 4, 6)
    assert tuning._is_right(model, [[x], [x[:2]]], torch.float32, False, kernels) and seen == [2]
    with pytest.raises(torch.OutOfMemoryError):
        tuning._is_right(model, [[x], [x[:3]]], torch.float32, False, kernels)


@pytest.mark.parametrize(
    ("off", "draws", "right"),
    [(("gradients", 1), 2, True), (("gradients", 99), tuning.DRAWS, False), (("outputs", 1), 1, False)],
    ids=["gradients of one draw", "all gradients", "outputs"],
)
def test_gradients_must_be_right_for_one_draw_and_outputs_for_all(off, draws, right):
    """One ReLU that falls the other way takes float32 gradients out of any bound, for these images alone."""
    seen = []

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits + float(off[0] == "outputs")

        @staticmethod
        def backward(ctx, gradient):
            return 1.1 * gradient

    def kernels(network, inputs):
        seen.append(inputs[0])
        logits = tuning.reference.forward(network, inputs)
        return [Off.apply(head) for head in logits] if len(seen) <= off[1] else logits

    model, x = small()
    assert tuning._is_right(model.train(), [[x]], torch.float32, True, kernels) == right and len(seen) == draws
    assert all(0 < (other - x).abs().max() < 0.1 * x.std() for other in seen[1:])
