"""The trainer for nnU-Net v2, on nnU-Net where it is installed, else on what of its interface the trainer meets."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.cpu_kernels import needs_library
from support.helpers import FLOAT32, assert_close_relative
from torch import nn

BASE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
EXAMPLE = Path(__file__).parents[2] / "examples" / "nnunet_trainer.py"


class WeightedSum(nn.Module):
    """nnU-Net's `DeepSupervisionWrapper`."""

    def __init__(self, loss, weight_factors):
        super().__init__()
        self.loss, self.weight_factors = loss, tuple(weight_factors)

    def forward(self, *args):
        assert all(isinstance(values, (tuple, list)) for values in args)
        pairs = zip(self.weight_factors, zip(*args, strict=True), strict=True)
        return sum(weight * self.loss(*values) for weight, values in pairs if weight)


class Base:
    """Of nnU-Net 2.8's `nnUNetTrainer` what `nnUNetTrainerUNetPlusPlus` inherits."""

    def _build_loss(self):
        def loss(logits, target):
            return nn.functional.cross_entropy(logits, target[:, 0].long())

        if not self.enable_deep_supervision:
            return loss
        weights = [1 / 2**k for k in range(len(self._get_deep_supervision_scales()))]
        weights[-1] = 1e-6 if self.is_ddp else 0
        return WeightedSum(loss, [weight / sum(weights) for weight in weights])

    def train_step(self, batch):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.network(batch["data"]), batch["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    try:
        importlib.import_module(BASE)
    except ImportError:
        parts = BASE.split(".")
        for count in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(parts[count - 1]))
        sys.modules[BASE].nnUNetTrainer = Base
    spec = importlib.util.spec_from_file_location("nnunet_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(dims: int, *, stages: int = 4, **other) -> dict:
    """`arch_kwargs` as nnU-Net writes them, of narrow maps."""
    return {
        "n_stages": stages,
        "features_per_stage": [4, 6, 8, 10, 10, 10, 10, 10][:stages],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * stages,
        "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **other,
    }


def trainer_of(example: ModuleType, arguments: dict, **attributes):
    """A trainer after its `initialize`, without nnU-Net's folders."""
    trainer = object.__new__(example.nnUNetTrainerUNetPlusPlus)
    trainer.configuration_manager = SimpleNamespace(
        network_arch_init_kwargs=arguments, pool_op_kernel_sizes=arguments["strides"], batch_dice=False
    )
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    trainer.__dict__.update({"is_ddp": False, "enable_deep_supervision": True, **attributes})
    torch.manual_seed(0)
    trainer.network = trainer.build_network_architecture(
        None, trainer.configuration_manager, 1, 3, trainer.enable_deep_supervision
    )
    trainer.loss = trainer._build_loss()
    return trainer


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library())])
@pytest.mark.parametrize(("dims", "size"), [(2, (16, 24)), (3, (8, 16, 8))])
def test_a_step_trains_all_heads_but_the_last(example, dims, size, backend):
    trainer = trainer_of(example, plan(dims))
    trainer.network.backend = backend
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=0.01, momentum=0.99, nesterov=True)
    assert trainer._get_deep_supervision_scales() == [[1.0] * dims] * 3
    assert trainer.loss.weight_factors == pytest.approx([2 / 3, 1 / 3, 0])
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    target = torch.randint(0, 3, (2, 1, *size)).float()
    batch = {"data": torch.randn(2, 1, *size), "target": [target] * 3}
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(3)]
    assert losses[2] < losses[0]
    weights = {name for name in before if name.endswith("weight")}  # a norm takes away the biases before it
    still = {name for name in weights if torch.equal(trainer.network.get_parameter(name), before[name])}
    assert still == {"heads.x0_1.weight"}  # only this head has no weight in the loss


@pytest.mark.parametrize("wrap", ["plain", "compiled", "ddp"])
def test_deep_supervision_is_switched_on_the_network_itself(example, wrap):
    trainer = trainer_of(example, plan(2))
    network, x = trainer.network, torch.randn(1, 1, 16, 16)
    compiled = SimpleNamespace(_orig_mod=network)
    trainer.is_ddp = wrap == "ddp"
    trainer.network = {"plain": network, "compiled": compiled, "ddp": SimpleNamespace(module=compiled)}[wrap]
    heads = network(x)
    assert isinstance(heads, tuple) and [head.shape for head in heads] == [(1, 3, 16, 16)] * 3
    trainer.set_deep_supervision_enabled(False)
    assert_close_relative(network(x), heads[0], FLOAT32)
    trainer.set_deep_supervision_enabled(True)
    assert len(network(x)) == 3


def test_inference_builds_the_network_that_takes_the_weights(example):
    trained = trainer_of(example, plan(2)).network
    build, x = example.nnUNetTrainerUNetPlusPlus.build_network_architecture, torch.randn(1, 1, 16, 16)
    assert "plans_manager" in inspect.signature(build).parameters  # by which nnU-Net tells how to call it
    manager = SimpleNamespace(network_arch_init_kwargs=plan(2))
    old = ("PlainConvUNet", plan(2), ["conv_op"])
    for arguments in ((None, manager), old):
        network = build(*arguments, 1, 3, enable_deep_supervision=False)
        network.load_state_dict(trained.state_dict())
        assert_close_relative(network(x), trained(x)[0], FLOAT32)
    assert build(*old, 1, 3, True).deep_supervision


def test_without_deep_supervision_there_is_one_output_and_one_target(example):
    trainer = trainer_of(example, plan(2), enable_deep_supervision=False)
    assert trainer._get_deep_supervision_scales() is None
    assert trainer.network(torch.randn(1, 1, 16, 16)).shape == (1, 3, 16, 16)


def test_a_plan_of_eight_stages_becomes_seven(example):
    trainer = trainer_of(example, plan(2, stages=8))
    assert len(trainer.network(torch.randn(1, 1, 128, 128))) == 6 == len(trainer._get_deep_supervision_scales())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"strides": [[1, 1, 1], [1, 2, 2], [4, 2, 2], [2, 2, 2]]}, r"asks for: strides must be 3 tuples .*\[4, 2, 2\]"),
        ({"strides": [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]}, r"begins with a stride of \[1, 2, 2\]"),
        ({"kernel_sizes": [[1, 5, 5], [3, 3, 3], [3, 3, 3], [3, 3, 3]]}, r"kernels must be 4 tuples .*\[1, 5, 5\]"),
        ({"strides": [[1, 1, 1], [2, 2, 2]]}, "at least 3 stages"),
        ({"dropout_op": "torch.nn.Dropout3d"}, "Dropout3d"),
        ({"norm_op": "torch.nn.GroupNorm"}, "GroupNorm"),
        ({"nonlin": "torch.nn.Mish"}, "Mish"),
    ],
)
def test_other_plans_are_refused_with_the_reason(example, other, says):
    with pytest.raises(ValueError, match=says):
        example.network_from_plan(plan(3, **other), 1, 2)


def test_a_plan_for_unlike_axes(example):
    shapes = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * 3}
    trainer = trainer_of(example, plan(3, **shapes))
    assert trainer.network.multiples == (4, 8, 8)
    assert [head.shape for head in trainer.network(torch.randn(1, 1, 4, 16, 8))] == [(1, 3, 4, 16, 8)] * 3


def test_norms_and_activations_of_a_plan(example):
    batch = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm2d", "norm_op_kwargs": {"eps": 1e-3, "affine": True}}
    other = example.network_from_plan(plan(2, **batch, nonlin="torch.nn.ReLU", conv_bias=False), 1, 2)
    assert other.options["norm"] == ("batch", {"eps": 1e-3, "momentum": 0.1})
    assert other.options["act"] == "relu" and not other.options["bias"]
    usual = example.network_from_plan(plan(2), 1, 2)
    assert usual.options["norm"] == ("instance", {"eps": 1e-5, "affine": True})
    assert usual.options["act"] == ("leaky_relu", {"negative_slope": 0.01}) and usual.options["bias"]
    assert example.network_from_plan(plan(2, norm_op=None), 1, 2).options["norm"] is None
