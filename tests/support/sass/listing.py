"""The functions that cuobjdump lists, as decoded instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate that must hold, or ""
    name: str  # without the letter of the uniform data path
    kinds: tuple[str, ...]  # what follows the name after points
    operands: tuple[str, ...]
    text: str


def functions(listing: str) -> Iterator[tuple[int, str, str]]:
    """Architecture, name and text of each function that cuobjdump lists."""
    for part in re.split(r"^\s*arch = sm_", listing, flags=re.MULTILINE)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for function in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            name, _, text = function.partition("\n")
            yield architecture, name.strip(), text


def decode(text: str) -> list[Instruction]:
    """The instructions of a function."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, flags=re.MULTILINE)
    return [_decoded(int(address, 16), line) for address, line in lines]


def _decoded(address: int, line: str) -> Instruction:
    guard, opcode, rest = re.match(r"(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*)", line).groups()
    name, *kinds = opcode.split(".")
    operands = tuple(part.strip().replace(".reuse", "") for part in rest.split(",")) if rest else ()
    return Instruction(address, guard or "", name.removeprefix("U"), tuple(kinds), operands, line)


@cache
def operand_of(text: str) -> tuple[str, str, object]:
    """Sign ("", "-" or "~"), kind and content of an operand."""
    sign = text[0] if text[0] in "-~" else ""
    body = text.removeprefix(sign).strip("|")
    if body in ("RZ", "URZ", "SRZ"):
        return sign, "number", 0
    if re.fullmatch(r"U?R\d+(\.64)?", body):
        return sign, "register", body.removesuffix(".64")
    if re.fullmatch(r"0x[0-9a-f]+", body):
        return sign, "number", int(body, 16)
    if match := re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+)?(0x[0-9a-f]+)\]", body):
        return sign, "constant", (match[1] or "RZ", int(match[2], 16))
    return sign, "other", body


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[\dT]", text) is not None
