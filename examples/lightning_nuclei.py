"""UNet++ trained with Lightning on half of the sample image, tested on the other half. Needs lightning.

python examples/lightning_nuclei.py
"""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.experiments.demo import halves
from unetpp_fast.training.evaluation import evaluate


class Nuclei(lightning.LightningModule):
    """UNet++ with the paper's loss and Adam; `options`: of the network."""

    def __init__(self, **options):
        super().__init__()
        self.model, self.loss = uf.UNetPlusPlus(1, 1, deep_supervision=True, **options), uf.BCEDiceLoss()

    def training_step(self, batch, index):
        image, mask = batch
        loss = self.loss(self.model(image), mask)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(steps: int = 100, features: tuple[int, ...] = (16, 32, 64, 128, 256), **options) -> float:
    """Trains; returns the IoU on the held-out half. `options`: of `lightning.Trainer`."""
    lightning.seed_everything(0)
    left, right = halves()
    patches = Patches([left], 96, per_image=8 * steps, seed=0)
    module = Nuclei(features=features)
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader([patches[0, draw] for draw in range(len(patches))], batch_size=8))
    iou = evaluate(module.model, [right])["iou"]
    print(f"IoU on the right half: {iou:.4f}")
    return iou


if __name__ == "__main__":
    main()
