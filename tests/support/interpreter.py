"""Triton's interpreter without work whose results it drops: the kernels' tests run several times as fast."""

from __future__ import annotations

import dataclasses


def quicken() -> None:
    """Leaves out two things that change no result.

    The interpreter checks every integer operation for overflow, but reports one only in debug mode, which is off. And it
    replaces the operators of `triton.language` again for every call of a device function, inside a launch that has done so.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replace_operators = interpreter._patch_lang

    def replace_once(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return replace_operators(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
