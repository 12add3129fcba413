"""Networks whose gradients do not depend on rounding: for one image, no input of an activation is near to a choice."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHOICES = {nn.ReLU: (0.0,), nn.ReLU6: (0.0, 6.0), nn.LeakyReLU: (0.0,)}  # where an activation's slope changes
REACH, STEPS = 0.15, 301  # by which a channel is shifted at most, and the shifts that are tried


@torch.no_grad()
def randomise_norms(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Batch norms as training leaves them: statistics of their inputs, scales and shifts of all sizes. In eval mode.

    Random paths of the model are those of `seed` too.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
        norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
        norm.momentum = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()(x)
    return model.eval()


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Shifts the biases of layers before activations, by channel, until no value of the image is near a choice."""
    exact, before = copy.deepcopy(model).double(), []
    mine = dict(model.named_modules())

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        before.append(module)

    def shift(module: nn.Module, inputs: tuple) -> tuple[Tensor]:
        (values,) = inputs
        layer = next(layer for layer in reversed(before) if len(layer.bias) == values.shape[1])
        found = shifts(values, CHOICES[type(module)])
        moved = (layer.bias + found).float().double()
        values = values + (moved - layer.bias)[:, None, None]
        layer.bias.copy_(moved)
        mine[names[layer]].bias.copy_(moved)
        return (values,)

    names = {module: name for name, module in exact.named_modules()}
    for module in names:
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d) and module.bias is not None:
            module.register_forward_hook(note)
        elif type(module) in CHOICES:
            module.register_forward_pre_hook(shift)
    exact(x.double())


def shifts(values: Tensor, choices: Sequence[float]) -> Tensor:
    """For each channel of `[N, C, H, W]`, the shift within reach that brings its values farthest from all choices."""
    rows = values.transpose(0, 1).flatten(1).sort(dim=1).values.contiguous()
    tried = torch.linspace(-REACH, REACH, STEPS, dtype=values.dtype).expand(len(rows), -1)
    least = torch.full_like(tried, float("inf"))
    for choice in choices:
        wanted = (choice - tried).contiguous()  # a value here would be at the choice
        above = torch.searchsorted(rows, wanted)
        for neighbour in (above - 1, above):
            value = rows.gather(1, neighbour.clamp(0, rows.shape[1] - 1))
            least = least.minimum((value - wanted).abs())
    return tried.gather(1, least.argmax(1, keepdim=True))[:, 0]
