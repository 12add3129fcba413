"""The decorator of every kernel: what it is compiled anew for, and with which options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import triton


def kernel(function: Callable | None = None, *, aligned: tuple[str, ...] = ()):
    """`triton.jit` of a function that is launched; those that kernels call take `triton.jit` itself.

    Triton compiles a kernel again for each set of its arguments that are multiples of 16. That matters where addresses are
    computed: for pointers, strides, and channels C or K, so that 16 bytes are loaded at once. Sizes in pixels and tiles
    do not count, but for those in `aligned`. Multiplications and additions are fused, whatever Triton's default.
    """
    if function is None:
        return functools.partial(kernel, aligned=aligned)
    jitted = triton.jit(function, do_not_specialize_on_alignment=_sizes(function, aligned))
    jitted.run = functools.partial(jitted.run, enable_fp_fusion=True)
    return jitted


def _sizes(function: Callable, aligned: tuple[str, ...]) -> list[str]:
    """The arguments in lower case that are neither pointers, strides nor `aligned`."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
        and name.islower()
        and not name.endswith("_ptr")
        and "_stride" not in name
        and name not in aligned
    ]
