"""The ops of `naive.py` by Triton kernels, under the same names."""

from .conv import conv
from .conv_wgrad import conv_wgrad
from .head import head, head_backward
from .norm import act_backward, border_sums, norm_backward, norm_finalise
from .pool import pool, pool_backward

__all__ = [
    "act_backward",
    "border_sums",
    "conv",
    "conv_wgrad",
    "head",
    "head_backward",
    "norm_backward",
    "norm_finalise",
    "pool",
    "pool_backward",
]
