"""UNet++ as the network of nnU-Net v2: its plans, data, schedule and loss, with our nested network in place of its U-Net.

Copy this file into a folder of its own and name the folder to nnU-Net (or copy it into `nnunetv2/training/nnUNetTrainer/`):

export nnUNet_extTrainer=FOLDER
nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerUNetPlusPlus

From a plan it takes the number of stages (3 to 7; of more, the first 7), their widths, the norm, the activation and whether
convolutions have a bias. Each node has two convolutions, whatever the plan says of convolutions or residual blocks.
Strides of 1 and 2 and kernels of 1 and 3 may differ between axes, as in plans for anisotropic volumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from unetpp_fast.architecture.options import Option
from unetpp_fast.architecture.topology import MAX_DEPTH, Topology
from unetpp_fast.common.errors import InputError
from unetpp_fast.models.network import Network

MOST_STAGES = MAX_DEPTH + 1
FEWEST_STAGES = 3  # nnU-Net's weights leave the last head out: with two stages there is no other


def network_from_plan(
    plan: Mapping[str, Any], in_channels: int, out_channels: int, enable_deep_supervision: bool = True
) -> Network:
    """The network for a configuration's `arch_kwargs`. It has all heads, also without deep supervision: then only the
    deepest one's logits are returned, and a state_dict fits both.

    Raises:
        InputError: the plan has what the network does not: see the top of this file.
    """
    stages = stages_of(plan["strides"])
    strides, kernels = plan["strides"][:stages], plan["kernel_sizes"][:stages]
    dims = len(strides[0])
    topology = Topology.nested(in_channels, plan["features_per_stage"][:stages], spatial_dims=dims, all_heads=True)
    try:
        topology = topology.over_levels(strides[1:], kernels)
    except ValueError as error:
        raise InputError(f"UNet++ does not have what this plan asks for: {error}") from error
    if set(strides[0]) != {1}:
        raise InputError(
            f"UNet++ has its first level at the image's size, but this plan begins with a stride of {strides[0]}"
        )
    if plan.get("dropout_op") is not None:
        raise InputError(f"this plan drops channels ({plan['dropout_op']}), which UNet++ does not: set dropout_op to null")
    bias = bool(plan.get("conv_bias", False))
    return Network(
        topology,
        out_channels,
        norm=norm_of(plan),
        act=act_of(plan),
        upsample=("deconv", {"bias": bias}),
        bias=bias,
        downsample="stride",
        deep_supervision=enable_deep_supervision,
        form="deepest_first",
    )


def stages_of(strides: Sequence[Sequence[int]]) -> int:
    """How many stages of a plan the network has."""
    if len(strides) < FEWEST_STAGES:
        raise InputError(f"UNet++ needs a plan of at least {FEWEST_STAGES} stages, and this one has {len(strides)}")
    return min(len(strides), MOST_STAGES)


def norm_of(plan: Mapping[str, Any]) -> Option | None:
    """The norm that a plan names, as an option of `Network`."""
    name, given = plan.get("norm_op"), plan.get("norm_op_kwargs") or {}
    if name is None:
        return None
    if "InstanceNorm" in str(name):
        return "instance", {"eps": given.get("eps", 1e-5), "affine": given.get("affine", False)}
    if "BatchNorm" in str(name) and given.get("affine", True):
        return "batch", {"eps": given.get("eps", 1e-5), "momentum": given.get("momentum", 0.1)}
    raise InputError(f"this plan's norm is {name} with {given}: UNet++ takes InstanceNorm, an affine BatchNorm or none")


def act_of(plan: Mapping[str, Any]) -> Option:
    """The activation that a plan names, as an option of `Network`."""
    name, given = str(plan.get("nonlin")).split(".")[-1], plan.get("nonlin_kwargs") or {}
    if name == "LeakyReLU":
        return "leaky_relu", {"negative_slope": given.get("negative_slope", 0.01)}
    if name in ("ReLU", "GELU", "SiLU"):
        return name.lower()
    if name == "PReLU":
        return "prelu", {key: given[key] for key in ("num_parameters", "init") if key in given}
    raise InputError(f"this plan's activation is {plan.get('nonlin')}: UNet++ takes LeakyReLU, ReLU, PReLU, GELU or SiLU")


class nnUNetTrainerUNetPlusPlus(nnUNetTrainer):
    """nnU-Net's trainer with UNet++.

    Its heads are all as large as the patch, and the deepest, X(0,depth), comes first: nnU-Net predicts with it. nnU-Net's
    weights, half as much for each next head and none for the last one, X(0,1), then apply as they are.
    """

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, *channels: Any, **options: Any) -> Network:
        """For the channels of the image, the classes, and `enable_deep_supervision`; called in training and in inference.

        Older versions of nnU-Net pass three arguments in place of the managers: a class, its `arch_kwargs`, what to import.
        """
        if isinstance(configuration_manager, Mapping):
            return network_from_plan(configuration_manager, *channels[1:], **options)
        return network_from_plan(configuration_manager.network_arch_init_kwargs, *channels, **options)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        network = self.network.module if self.is_ddp else self.network
        getattr(network, "_orig_mod", network).deep_supervision = enabled  # what torch.compile wraps

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        strides = self.configuration_manager.pool_op_kernel_sizes
        return [[1.0] * len(strides[0]) for _ in range(stages_of(strides) - 1)]
