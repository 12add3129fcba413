"""What the instructions on integers do, and those that move values."""

from __future__ import annotations

import math
import struct

from support.sass.listing import is_predicate, operand_of
from support.sass.registers import MASK, Loaded, Registers, after, signed_of

COMPARE = {
    "LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__,
}  # fmt: skip


class Arithmetic(Registers):
    """`do_name(kinds, *operands)` for each instruction, by its name and what follows it after points."""

    def do_iadd3(self, kinds, target, *operands) -> None:
        first = next(k for k, operand in enumerate(operands) if not is_predicate(operand))
        last = next((k for k in range(first, len(operands)) if is_predicate(operands[k])), len(operands))
        sources, carries = operands[first:last], [self.predicate(operand) for operand in operands[last:]]
        if "64" in kinds:
            values = [self.wide(source) for source in sources]
            self.set_wide(target, None if None in values else sum(values))
            return
        values = [self.value(source) for source in sources]
        loaded = [value for value in values if isinstance(value, Loaded)]
        rest = sum(value for value in values if isinstance(value, int))
        if len(loaded) == 1 and rest in (0, 0x1000):  # as it is, or rounded to TF32
            self.set(target, loaded[0])
        elif None in carries or not all(isinstance(value, int) for value in values):
            self.set(target, None)
            for carry in operands[:first]:
                self.set(carry, None)
        else:
            # Minus zero is ~0 + 1, which carries.
            total = (
                rest
                + sum(carries)
                + sum(value == 0 and source[0] == "-" for value, source in zip(values, sources, strict=True)) * 2**32
            )
            self.set(target, total)
            for k, carry in enumerate(operands[:first]):
                self.set(carry, total >> 32 > k)

    do_iadd = do_viadd = do_iadd3

    def do_imad(self, kinds, target, *operands) -> None:
        carries = [operand for operand in operands if is_predicate(operand)]
        a, b, c = (operand for operand in operands if not is_predicate(operand))
        factors = self.integers(a, b, signed="U32" not in kinds)
        if "WIDE" in kinds or "HI" in kinds:
            added = self.wide(c)
            total = None if factors is None or added is None else factors[0] * factors[1] + added
            if "WIDE" in kinds:
                self.set_wide(target, total)
            else:
                self.set(target, None if total is None else total >> 32)
            return
        added = self.value(c)
        if factors and 0 in factors and not carries:
            self.set(target, added)
        elif isinstance(self.value(a), Loaded) and self.value(b) == 1:
            self.set(target, self.value(a) if added in (0, 0x1000) else None)  # as above
        else:
            carry = [self.predicate(text) for text in carries]
            known = factors is not None and isinstance(added, int) and None not in carry
            self.set(target, factors[0] * factors[1] + added + sum(carry) if known else None)

    def do_lea(self, kinds, target, *operands) -> None:
        predicates = [operand for operand in operands if is_predicate(operand)]
        sources = [operand for operand in operands if not is_predicate(operand)]
        values = self.integers(*sources)
        carry = [self.predicate(text) for text in predicates] if "X" in kinds else []
        if values is None or None in carry:
            self.set(target, None)
            return
        a, b, shift = values[0], values[1], values[-1]
        if "HI" in kinds:
            high = (MASK if a >> 31 else 0) if "SX32" in kinds else values[2]
            total = ((high << 32 | a) << shift >> 32 & MASK) + b + sum(carry)
        else:
            total = (a << shift & MASK) + b
        self.set(target, total)
        if predicates and "X" not in kinds:
            self.set(predicates[0], total >> 32 > 0)

    def do_shf(self, kinds, target, low, shift, high) -> None:
        values = self.integers(low, shift, high)
        if values is None:
            self.set(target, None)
            return
        whole = values[0] | values[2] << 32
        if "S32" in kinds or "S64" in kinds:
            whole = signed_of(whole, 64)
        count = values[1] & (31 if "W" in kinds else 255)
        moved = whole << count if kinds[0] == "L" else whole >> count
        self.set(target, moved >> 32 if "HI" in kinds else moved)

    def do_lop3(self, kinds, target, *operands) -> None:
        flag, sources = (target, operands[1:]) if is_predicate(target) else (None, operands)
        target = operands[0] if flag else target
        # ptxas keeps predicates as bits of a register that nobody wrote as a whole.
        written = ["RZ" if self.is_unwritten(source) else source for source in sources[:3]]
        values, table = self.integers(*written), int(sources[3], 16)
        result = None if values is None else _looked_up(values, table, MASK)
        self.set(target, result)
        if flag:
            self.set(flag, None if result is None else result != 0)

    def do_plop3(self, kinds, first, second, *operands) -> None:
        values = [self.predicate(operand) for operand in operands[:3]]
        for target, table in ((first, operands[3]), (second, operands[4])):
            self.set(
                target, None if None in values else bool(_looked_up([int(value) for value in values], int(table, 16), 1))
            )

    def do_isetp(self, kinds, first, second, a, b, *conditions) -> None:
        if "S64" in kinds or "U64" in kinds:
            values = [self.wide(a, signed="S64" in kinds), self.wide(b, signed="S64" in kinds)]
        else:
            values = self.integers(a, b, signed="U32" not in kinds)
        result = None
        if values and None not in values:
            result = COMPARE[kinds[0]](*values)
            if "EX" in kinds and values[0] == values[1]:
                result = self.predicate(conditions[-1])
        joined = either if "OR" in kinds else both
        other = self.predicate(conditions[0])
        self.set(second, joined(None if result is None else not result, other))
        self.set(first, joined(result, other))

    def do_fsetp(self, kinds, first, second, a, b, *conditions) -> None:
        """Loaded values are finite; others are unknown."""
        finite = isinstance(self.value(a), Loaded) and b.startswith("+INF") and kinds[0] == "GEU"
        self.set(second, None)
        self.set(first, False if finite else None)

    def do_sel(self, kinds, target, a, b, condition) -> None:
        holds = self.predicate(condition)
        source = a if holds else b
        if "64" in kinds:
            self.set_wide(target, None if holds is None else self.wide(source))
        else:
            self.set(target, None if holds is None else self.value(source))

    def do_imnmx(self, kinds, target, *operands) -> None:
        smaller = operands[-1]
        values = self.integers(*(text for text in operands if not is_predicate(text)), signed="U32" not in kinds)
        if values is None:
            self.set(target, None)
            return
        if len(values) == 3:
            values = [signed_of(sum(values[:2]) & MASK), values[2]]
        result = min(values) if self.predicate(smaller) else max(values)
        self.set(target, max(result, 0) if "RELU" in kinds else result)

    do_vimnmx = do_viaddmnmx = do_imnmx

    def do_iabs(self, kinds, target, source) -> None:
        values = self.integers(source, signed=True)
        self.set(target, values and abs(values[0]))

    def do_prmt(self, kinds, target, a, selector, b) -> None:
        # As in do_lop3: half of such a register is kept, and never read.
        values = self.integers(*("RZ" if self.is_unwritten(source) else source for source in (a, selector, b)))
        if values is None:
            self.set(target, None)
            return
        octets = (values[0] | values[2] << 32).to_bytes(8, "little")
        picked = [values[1] >> 4 * k & 15 for k in range(4)]
        self.set(
            target, int.from_bytes(bytes(octets[k & 7] if k < 8 else 255 * (octets[k & 7] >> 7) for k in picked), "little")
        )

    # ---- Moves ----

    def do_mov(self, kinds, target, source) -> None:
        if "64" in kinds:
            self.set_wide(target, self.wide(source))
        else:
            self.set(target, self.value(source))

    def do_r2ur(self, kinds, target, source) -> None:
        self.set(target, self.value(source))

    def do_cs2r(self, kinds, target, source) -> None:
        self.set_wide(target, 0 if source == "SRZ" else None)

    def do_hfma2(self, kinds, target, a, b, high, low) -> None:
        """Two halves, used to write a constant."""
        known = self.value(a) == self.value(b) == 0 and operand_of(high)[1] != "register"
        self.set(target, int.from_bytes(struct.pack("<2e", float(low), float(high)), "little") if known else None)

    def do_s2r(self, kinds, target, source) -> None:
        self.set(target, self.special.get(source))

    do_s2ur = do_s2r

    def do_ldc(self, kinds, target, source) -> None:
        count = 4 if "128" in kinds else 2 if "64" in kinds else 1
        place = operand_of(source)[2]
        for k in range(count):
            self.set(after(target, k), self.constant((place[0], place[1] + 4 * k), 1 if "U8" in kinds else 4))

    do_ldcu = do_ldc

    def do_voteu(self, kinds, target, *sources) -> None:
        self.set(target, self.predicate(sources[-1]))

    def do_p2r(self, kinds, target, _, kept, mask) -> None:
        bits = [self.predicates.get(f"P{k}") for k in range(7)]
        mask, kept = self.value(mask), self.value(kept)
        known = kept is not None and not any(bit is None and mask >> k & 1 for k, bit in enumerate(bits))
        self.set(target, kept & ~mask | sum(bool(bit) << k for k, bit in enumerate(bits)) & mask if known else None)

    # ---- The reciprocal that an integer division begins with ----

    def do_i2f(self, kinds, target, source) -> None:
        value = self.value(source)
        self.set(target, _bits(float(value), up=True) if "RP" in kinds and isinstance(value, int) else None)

    def do_mufu(self, kinds, target, source) -> None:
        value = self.value(source)
        known = "RCP" in kinds and isinstance(value, int) and _float(value) > 0
        self.set(target, _bits(1 / _float(value)) if known else None)

    def do_f2i(self, kinds, target, source) -> None:
        value = self.value(source)
        known = "TRUNC" in kinds and isinstance(value, int) and math.isfinite(_float(value))
        self.set(target, int(_float(value)) if known else None)


def _looked_up(values: list[int], table: int, mask: int) -> int:
    """The function of three bits that `table` lists, for each bit of three values."""
    result = 0
    for row in range(8):
        if table >> row & 1:
            terms = [value if row >> 2 - k & 1 else ~value for k, value in enumerate(values)]
            result |= terms[0] & terms[1] & terms[2] & mask
    return result


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(value: float, up: bool = False) -> int:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits + 1 if up and _float(bits) < value else bits


def either(a: bool | None, b: bool | None) -> bool | None:
    return True if a or b else None if a is None or b is None else False


def both(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True
