"""Several networks that predict together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import InputError


class Ensemble(nn.Module):
    """The mean of the probabilities of several networks, such as those of a cross-validation.

    >>> model = Ensemble([from_pretrained("fold0"), from_pretrained("fold1")])
    >>> probabilities = predict_tiled(model, x)  # or model.predict(x)

    It is not trained, pruned or optimised: its members are.

    Args:
        networks: for the same channels, classes and number of spatial axes, trained on images prepared in one way.

    Raises:
        InputError: they differ in these.
    """

    def __init__(self, networks: Sequence[Any]):
        super().__init__()
        if not networks:
            raise InputError("an ensemble needs at least one network")
        for name, values in {
            "channels": [network.topology.in_channels for network in networks],
            "classes": [network.out_channels for network in networks],
            "spatial axes": [network.topology.spatial_dims for network in networks],
            "ways to prepare images": [network.normalisation for network in networks],
            "sizes of voxels": [network.spacing for network in networks],
            "kinds of classes (exclusive or not)": [network.exclusive for network in networks],
        }.items():
            other = next((value for value in values if value != values[0]), values[0])
            if other != values[0]:
                raise InputError(f"networks with different {name} cannot predict together: {values[0]} and {other}")
        self.members = nn.ModuleList(sorted(networks, key=lambda network: -network.multiple))  # all pad to the largest

    @property
    def network(self) -> Any:
        """The member that describes all: what images are padded to is a multiple of what every member needs."""
        return self.members[0]

    topology = property(lambda self: self.network.topology)
    out_channels = property(lambda self: self.network.out_channels)
    normalisation = property(lambda self: self.network.normalisation)
    spacing = property(lambda self: self.network.spacing)
    exclusive = property(lambda self: self.network.exclusive)
    multiple = property(lambda self: self.network.multiple)

    def forward(self, x: Tensor) -> Tensor:
        """The probabilities of `predict(x)`."""
        return self.predict(x)

    @torch.no_grad()
    def predict(self, x: Tensor, **options: Any) -> Tensor:
        """Probabilities `[N, out_channels, *S]`, as of `Network.predict`, which takes the same options.

        Args:
            x: `[N, in_channels, *S]` of any size, as each member takes it.
            **options: mode, level, activation, flips.

        Raises:
            TypeError, ValueError: as `Network.predict`.
        """
        total = self.members[0].predict(x, **options)
        for member in self.members[1:]:
            total = total + member.predict(x, **options)
        return total / len(self.members)
