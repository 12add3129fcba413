"""UNet++ over an encoder, with deep supervision and without: trained on half of the sample image, tested on the other half.

python examples/encoder_nuclei.py [ENCODER] [EPOCHS]

ENCODER is a name of timm (default resnet18), without ImageNet's weights. Needs timm: pip install 'unetpp_fast[encoders]'.
"""

from __future__ import annotations

import sys

from torch import nn

import unetpp_fast as uf
from unetpp_fast.experiments.demo import PATCH, halves, make_recipe, trained
from unetpp_fast.training.evaluation import evaluate

DECODER = (64, 48, 32, 24, 16)


def main(encoder: str | nn.Module = "resnet18", epochs: int = 6, **options) -> dict[str, float]:
    """IoU on the right half of the sample of each network, by its name; `options`: of the networks."""
    (left, right), found = halves(), {}
    options = {"encoder": encoder, "decoder_channels": DECODER, **options}
    for supervised in (True, False):
        name = "deep supervision" if supervised else "one head"
        model = trained(
            name, uf.UNetPlusPlus, left, make_recipe(epochs), "cpu", PATCH, deep_supervision=supervised, **options
        )
        models = {name: model}
        if supervised:
            models |= {f"{name}, prune({level})": model.prune(level) for level in model.topology.heads}
        for title, network in models.items():
            found[title] = evaluate(network, [right])["iou"]
            print(f"{title:<28} IoU {found[title]:.4f}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
