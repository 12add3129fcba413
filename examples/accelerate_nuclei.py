"""UNet++ trained with accelerate on half of the sample image, tested on the other half. Needs accelerate.

accelerate launch examples/accelerate_nuclei.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.experiments.demo import halves
from unetpp_fast.training.evaluation import evaluate


def main(steps: int = 100, features: tuple[int, ...] = (16, 32, 64, 128, 256), **options) -> float:
    """Trains; returns the IoU on the held-out half. `options`: of `Accelerator`."""
    torch.manual_seed(0)
    accelerator = Accelerator(**options)
    left, right = halves()
    patches = Patches([left], 96, per_image=8 * steps, seed=0)
    loader = DataLoader([patches[0, draw] for draw in range(len(patches))], batch_size=8)
    model = uf.UNetPlusPlus(1, 1, features=features, deep_supervision=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3), loader)
    criterion = uf.BCEDiceLoss()
    for image, mask in loader:
        loss = criterion(model(image), mask)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    iou = evaluate(accelerator.unwrap_model(model), [right])["iou"]
    accelerator.print(f"IoU on the right half: {iou:.4f}")
    return iou


if __name__ == "__main__":
    main()
