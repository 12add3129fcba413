"""Triton's interpreter without work whose results it drops or has had: the kernels' tests run several times as fast."""

from __future__ import annotations

import dataclasses
import functools
import math


def quicken() -> None:
    """Leaves out what changes no result.

    The interpreter checks every integer operation for overflow, but reports one only in debug mode, which is off. It
    replaces the operators of `triton.language` again for every call of a device function, inside a launch that has done so.
    And it derives the types and shapes of the same few blocks anew for every operation.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replace_operators = interpreter._patch_lang

    @functools.cache
    def modules_of(fn) -> list:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def replace_once(fn):
        if any(tl.core.is_builtin(module.load) for module in modules_of(fn)):
            return replace_operators(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
    _remember_types(tl.core, interpreter)
    _remember_promotions(interpreter.TritonSemantic)


def _remember_types(core, interpreter) -> None:
    """What a block's shape and its type for NumPy are; types are told apart by their names."""
    numpy_type, with_element_type = interpreter._get_np_dtype, core.block_type.with_element_ty
    unwrap, numpy_types, blocks, sizes = core._unwrap_if_constexpr, {}, {}, {}
    plain = {int, bool, float, str, type(None), core.dtype, core.pointer_type, core.block_type, core.tensor}

    def remembered_numpy_type(kind):
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def remembered_block(self, element):
        key = self.name, element.name
        if key not in blocks:
            blocks[key] = with_element_type(self, element)
        return blocks[key]

    def start_tensor(self, handle, kind) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        if kind.name not in sizes:
            shape = [*kind.shape] if kind.is_block() else []
            sizes[kind.name] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
        self.shape, self.numel = sizes[kind.name]

    def unwrapped(value):
        kind = type(value)
        return value if kind in plain else value.value if kind is core.constexpr else unwrap(value)

    interpreter._get_np_dtype, core._unwrap_if_constexpr = remembered_numpy_type, unwrapped
    core.block_type.with_element_ty, core.tensor.__init__ = remembered_block, start_tensor


def _remember_promotions(semantic) -> None:
    """Which type two types are computed in; and blocks of one shape are not broadcast to it."""
    promote, broadcast, promoted = semantic.computation_type_impl, semantic.broadcast_impl_value, {}

    def remembered(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in promoted:
            promoted[key] = promote(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return promoted[key]

    def broadcast_others(self, a, b):
        if a.type.is_block() and b.type.is_block() and [*a.type.shape] == [*b.type.shape]:
            return a, b
        return broadcast(self, a, b)

    semantic.computation_type_impl, semantic.broadcast_impl_value = remembered, broadcast_others
