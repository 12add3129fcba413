"""UNet++, unchanged, with MONAI's trainer, evaluator, metric and sliding windows. Needs monai and pytorch-ignite.

python examples/monai_trainer.py
"""

from __future__ import annotations

import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanIoUHandler, ValidationHandler, from_engine
from monai.inferers import SlidingWindowInferer
from torch.utils.data import DataLoader

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.experiments.demo import halves


def main(steps: int = 100, features: tuple[int, ...] = (16, 32, 64, 128, 256), device: str = "cpu") -> float:
    """Trains on the left half of the sample image; returns the IoU on the right half, predicted in 128x128 windows."""
    torch.manual_seed(0)
    left, right = halves()
    patches = Patches([left], 96, per_image=8 * steps, seed=0)
    batches = [dict(zip(("image", "label"), patches[0, draw], strict=True)) for draw in range(len(patches))]
    image, mask = (torch.from_numpy(values).float() for values in right.load())
    model = uf.UNetPlusPlus(1, 1, features=features, deep_supervision=True).to(device)

    def mask_of(output: dict) -> dict:
        """The mean over the heads, as in mode "accurate"."""
        output["pred"] = (torch.stack(list(output["pred"])).sigmoid().mean(dim=0) > 0.5).float()
        return output

    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=DataLoader([{"image": image, "label": mask}], batch_size=1),
        network=model,
        inferer=SlidingWindowInferer(roi_size=(128, 128), sw_batch_size=4, overlap=0.25),
        postprocessing=mask_of,
        decollate=False,
        key_val_metric={"iou": MeanIoUHandler(output_transform=from_engine(["pred", "label"]))},
    )
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=DataLoader(batches, batch_size=8),
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        loss_function=uf.BCEDiceLoss(),
        decollate=False,
        train_handlers=[ValidationHandler(validator=evaluator, interval=1)],
    )
    trainer.run()
    iou = float(evaluator.state.metrics["iou"])
    print(f"IoU on the right half: {iou:.4f}")
    return iou


if __name__ == "__main__":
    main()
