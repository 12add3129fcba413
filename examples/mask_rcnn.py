"""Instance segmentation of nuclei: Mask R-CNN on a UNet++ backbone, trained on the sample image. Needs torchvision.

python examples/mask_rcnn.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.data.images import read_image
from unetpp_fast.data.masks import read_labels
from unetpp_fast.experiments.demo import example


def build(features: tuple[int, ...] = (16, 32, 64, 128, 256), channels: int = 64):
    """Mask R-CNN for nuclei and background on the pyramid X(0,4), X(1,3), ..., X(4,0)."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    pyramid = uf.backbone(uf.UNetPlusPlus(3, 1, features=features), channels)
    levels = len(features)
    anchors = AnchorGenerator(tuple((8 * 2**level,) for level in range(levels)), ((0.5, 1.0, 2.0),) * levels)
    return MaskRCNN(pyramid, num_classes=2, rpn_anchor_generator=anchors, min_size=256, max_size=256)


def target(labels: np.ndarray) -> dict[str, Tensor]:
    """Boxes, classes and masks in torchvision's format, from numbered instances `[H, W]`."""
    masks = [labels == number for number in np.unique(labels) if number]
    corners = [(np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0) + 1) for mask in masks]
    boxes = torch.tensor([[low[1], low[0], high[1], high[0]] for low, high in corners], dtype=torch.float32)
    return {"boxes": boxes, "labels": torch.ones(len(masks), dtype=torch.int64), "masks": torch.from_numpy(np.stack(masks))}


def main(steps: int = 20, side: int = 256, **options) -> list[float]:
    """Trains on one corner of the image; returns the loss of each step."""
    torch.manual_seed(0)
    image = torch.from_numpy(read_image(example("nuclei/image.png"))[:, :side, :side]).expand(3, -1, -1)
    truth = target(read_labels(example("nuclei/instances.png"))[:side, :side])
    model = build(**options).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for step in range(steps):
        loss = sum(model([image], [truth]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
