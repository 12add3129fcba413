"""A forward pass that is about to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.network_spec import NetworkSpec
from ..architecture.precision import compute_dtype
from .built import layers_of

Inputs = Tensor | Sequence[Tensor]  # of a pass: the image, or the maps of an encoder, largest first


def inputs_of(x: Inputs) -> list[Tensor]:
    """The tensors of an input."""
    return [x] if isinstance(x, Tensor) else list(x)


class Call:
    """A network, its layers as they are now, and the input of one forward pass.

    The layers are walked once per call, because a walk takes as long as launching twenty kernels. Whatever is asked about
    them later (which have changed, which norms are in training, which tensors the operators take) is answered from here.

    Attributes:
        network: the argument. inputs: the image `[N, in_channels, *S]`, or the maps of an encoder. x: the first of them.
        dtype: of the maps; by default autocast's or the input's.
    """

    def __init__(self, network: NetworkSpec, x: Inputs, dtype: torch.dtype | None = None):
        self.network, self.inputs = network, inputs_of(x)
        self.x = self.inputs[0]
        self.dtype = dtype or compute_dtype(self.x)
        self._modules: list[nn.Module] | None = None

    @property
    def structure(self) -> Any:
        """`NetworkSpec.structure` of the network where the input has this size; None if the kernels cannot run it."""
        structure = self.network.structure
        if structure is None or structure.odd is None:
            return structure
        multiple = self.network.topology.multiple
        return structure.odd if any(side % multiple for side in self.x.shape[2:]) else structure

    @property
    def modules(self) -> list[nn.Module]:
        """The layers of its nodes and heads, as they are when they are first asked for."""
        if self._modules is None:  # not a `cached_property`, whose lock no graph can hold
            self._modules = layers_of(self.network)
        return self._modules

    @property
    def parameters(self) -> list[Tensor]:
        """Those of all layers, in the order of the network's structure."""
        return [value for module in self.modules for value in module._parameters.values() if value is not None]

    @property
    def buffers(self) -> list[Tensor]:
        """As `parameters`."""
        return [value for module in self.modules for value in module._buffers.values() if value is not None]

    @property
    def in_training(self) -> bool:
        """Whether any norm takes statistics of this batch; the layers of a network that was built without norms are not
        walked for it."""
        structure = self.network.structure
        if structure is not None and not structure.norms:
            return False
        return any(module.training for module in self.modules if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)))

    @property
    def drops(self) -> bool:
        """Whether any dropout is at work: also one in training mode in a network that is not."""
        return any(module.training and module.p > 0 for module in self.modules if isinstance(module, nn.Dropout))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, detached, by their names in the network; the network must have a structure."""
        structure = self.network.structure
        names, values = structure.parameters + structure.buffers, self.parameters + self.buffers
        return {name: value.detach() for name, value in zip(names, values, strict=True)}

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass may follow."""
        if not torch.is_grad_enabled():
            return False
        return any(tensor.requires_grad for tensors in (self.inputs, self.parameters) for tensor in tensors)
