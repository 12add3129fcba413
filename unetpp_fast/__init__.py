"""UNet++ for PyTorch: nested U-Nets with deep supervision, pruning, the paper's loss and recipe.

>>> import torch, unetpp_fast as uf
>>> model = uf.UNetPlusPlus(in_channels=1, deep_supervision=True)
>>> model.predict(torch.rand(1, 1, 100, 130)).shape
torch.Size([1, 1, 100, 130])
"""

from .backbone import backbone
from .backends import tune
from .convert import convert, to_state_dict
from .explaining import explain
from .losses import BCEDiceLoss
from .metrics import dice_score, iou_score
from .models import Network, UNet, UNetPlusPlus, from_paper, parameter_count
from .optimize import load_optimized, optimize
from .tiles import predict_tiled
from .topology import Node, Topology

__version__ = "0.1.0"

__all__ = [
    "BCEDiceLoss",
    "Network",
    "Node",
    "Topology",
    "UNet",
    "UNetPlusPlus",
    "backbone",
    "convert",
    "dice_score",
    "explain",
    "from_paper",
    "iou_score",
    "load_optimized",
    "optimize",
    "parameter_count",
    "predict_tiled",
    "to_state_dict",
    "tune",
]
