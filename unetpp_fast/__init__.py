"""UNet++ for PyTorch: nested U-Nets with deep supervision, pruning, the paper's loss and recipe.

>>> import torch, unetpp_fast as uf
>>> model = uf.UNetPlusPlus(in_channels=1, deep_supervision=True)
>>> model.predict(torch.rand(1, 1, 100, 130)).shape
torch.Size([1, 1, 100, 130])
"""

import importlib.util

if importlib.util.find_spec("unetpp_fast.kernels") is None:
    raise ImportError(
        "unetpp_fast.kernels is missing: Python has found a clone of the repository before the installed package; leave its"
        " folder, or install the clone itself, pip install --no-build-isolation -e ."
    )

from .architecture.topology import Node, Topology
from .common.version import __version__
from .converters.converter import convert, to_state_dict
from .data.postprocessing import postprocess
from .deployment.optimized import load_optimized, optimize
from .execution.dispatch import tune
from .execution.explanation import explain
from .models.architectures import UNet, UNetPlusPlus, from_paper, parameter_count
from .models.encoder_network import EncodedNetwork
from .models.ensemble import Ensemble
from .models.feature_pyramid import backbone
from .models.network import Network
from .models.normalisation import Normalisation
from .models.pretrained import from_pretrained
from .models.tiled_prediction import predict_tiled
from .training.captured import capture
from .training.exclusive import CrossEntropyDiceLoss
from .training.losses import BCEDiceLoss
from .training.metrics import dice_score, iou_score
from .training.weighted_losses import DeepSupervision, FocalLoss, TverskyLoss

__all__ = [
    "BCEDiceLoss",
    "CrossEntropyDiceLoss",
    "DeepSupervision",
    "EncodedNetwork",
    "Ensemble",
    "FocalLoss",
    "Network",
    "Node",
    "Normalisation",
    "Topology",
    "TverskyLoss",
    "UNet",
    "UNetPlusPlus",
    "__version__",
    "backbone",
    "capture",
    "convert",
    "dice_score",
    "explain",
    "from_paper",
    "from_pretrained",
    "iou_score",
    "load_optimized",
    "optimize",
    "parameter_count",
    "postprocess",
    "predict_tiled",
    "to_state_dict",
    "tune",
]
