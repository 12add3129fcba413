"""The registers of a thread, and what can be in them besides integers."""

from __future__ import annotations

import re
from typing import NamedTuple

from support.sass.listing import is_predicate, operand_of

MASK = 2**32 - 1


class Loaded(NamedTuple):
    """A register filled from shared memory: register `part` of a load at `address` by "word", "M" or "MT" (transposed)."""

    kind: str
    address: int
    part: int


class Sum:
    """The result of a product: what it was added to, and its factors."""

    def __init__(self, before: Sum | None, factors: tuple) -> None:
        self.before, self.factors, self.continued = before, factors, False

    def products(self) -> list[tuple]:
        found, here = [], self
        while here:
            found.append(here.factors)
            here = here.before
        return found[::-1]


class Element(NamedTuple):
    """One of the four registers of a sum."""

    sum: Sum
    place: int


class SassError(Exception):
    """What a thread does that no right kernel does, or that is not modelled."""


class Registers:
    """Registers, predicates and constant memory of a thread. Unknown values are None."""

    def __init__(self, constants: bytes) -> None:
        self.constants = constants
        self.values: dict[str, object] = {}
        self.predicates: dict[str, bool | None] = {}

    def set(self, target: str, value: object) -> None:
        if is_predicate(target):
            self.predicates[target] = value
        elif target not in ("RZ", "URZ"):
            self.values[target] = value & MASK if isinstance(value, int) else value

    def set_wide(self, target: str, value: int | None) -> None:
        self.set(target, value)
        self.set(after(target, 1), None if value is None else value >> 32)

    def predicate(self, text: str) -> bool | None:
        name = text.removeprefix("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or name == text else not value

    def value(self, text: str) -> object:
        sign, kind, content = operand_of(text)
        if kind == "number":
            value = content
        elif kind == "register":
            value = self.values.get(content)
        elif kind == "constant":
            value = self.constant(content, 4)
        else:
            value = None
        if not sign:
            return value
        if not isinstance(value, int):
            return None
        return -value & MASK if sign == "-" else ~value & MASK

    def is_unwritten(self, text: str) -> bool:
        _, kind, content = operand_of(text)
        return kind == "register" and content not in self.values

    def constant(self, place: tuple[str, int], size: int) -> int | None:
        start = self.value(place[0])
        if not isinstance(start, int):
            return None
        start += place[1]
        return int.from_bytes(self.constants[start : start + size], "little")

    def wide(self, text: str, signed: bool = False) -> int | None:
        """A value of 64 bits."""
        sign, kind, content = operand_of(text)
        if kind == "constant":
            value = self.constant(content, 8)
        elif kind == "number":
            value = content
        else:
            low, high = self.value(content), self.value(after(content, 1))
            value = low | high << 32 if isinstance(low, int) and isinstance(high, int) else None
        if value is None:
            return None
        value = (-value if sign == "-" else ~value if sign == "~" else value) & (2**64 - 1)
        return signed_of(value, 64) if signed else value

    def integers(self, *texts: str, signed: bool = False) -> list[int] | None:
        values = [self.value(text) for text in texts]
        if not all(isinstance(value, int) for value in values):
            return None
        return [signed_of(value) for value in values] if signed else values

    def place(self, text: str) -> int:
        """A place in shared memory, such as [R2.X4+UR4+0x20]."""
        total = 0
        for part in re.search(r"\[([^\[\]]*)\]$", text)[1].split("+"):
            name, _, factor = part.partition(".X")
            value = self.value(name)
            if not isinstance(value, int):
                raise SassError("an unknown address")
            total += value * int(factor or 1)
        return total & MASK


def after(register: str, count: int) -> str:
    if register in ("RZ", "URZ", "SRZ"):
        return register
    kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()
    return f"{kind}{int(number) + count}"


def signed_of(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value
