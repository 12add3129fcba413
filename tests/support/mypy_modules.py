"""For mypy: an attribute of a module that no class declares has any type, where PyTorch says `Tensor | Module`.

Networks here are modules of any kind with attributes of any kind, and neither of the two is what is meant.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, Type, TypeOfAny, UnionType, get_proper_type

FOUND_BY_NAME = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def any_type(context: AttributeContext) -> Type:
    """What `Module.__getattr__` gives, as any type."""
    given = get_proper_type(context.default_attr_type)
    parts = [get_proper_type(part) for part in given.items] if isinstance(given, UnionType) else []
    if {part.type.fullname for part in parts if isinstance(part, Instance)} == FOUND_BY_NAME and len(parts) == 2:
        return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


class Modules(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type]:
        return any_type


def plugin(version: str) -> type[Plugin]:
    return Modules
