"""Runs one thread of a compiled CUDA kernel, instruction by instruction.

Integers are computed as the GPU does. What is loaded from shared memory stands for its address, and a matrix product adds
the addresses of its factors to the sum that it carries on: so a test sees which values each accumulator has met. Anything
else, such as values of global memory and arithmetic on them, is unknown, and may not decide a branch.
"""

from __future__ import annotations

import re

from support.sass.arithmetic import Arithmetic, both
from support.sass.listing import Instruction, is_predicate
from support.sass.registers import Element, Loaded, SassError, Sum, after

MOST_STEPS = 200_000
# Where the kernel's arguments begin in constant memory.
ARGUMENTS = {80: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
NOTHING = ("BAR", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "LDGSTS", "NOP", "STS", "WARPSYNC")  # to registers


class Thread(Arithmetic):
    """Thread `thread` of block (0, 0) of a kernel of `arguments`, as bytes; `run` runs it to its end.

    After that, `sums` holds each sum as it ended, `copies` the places in shared memory that the thread copied to,
    `stored` what it wrote to each address of global memory, and `issued` every instruction on its way, in order, with
    whether its guard let it work (True where that is unknown).
    """

    def __init__(self, code: list[Instruction], architecture: int, arguments: bytes, thread: int) -> None:
        self.code, self.index = code, {instruction.address: k for k, instruction in enumerate(code)}
        super().__init__(bytes(ARGUMENTS[architecture]) + arguments + bytes(64))
        self.special = {"SR_TID.X": thread, "SR_CTAID.X": 0, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_CgaCtaId": 0}
        self.all_sums: list[Sum] = []
        self.copies: list[int] = []
        self.stored: dict[int, object] = {}
        self.issued: list[tuple[Instruction, bool]] = []

    @property
    def sums(self) -> list[Sum]:
        return [found for found in self.all_sums if not found.continued]

    def run(self) -> Thread:
        place = 0
        for _ in range(MOST_STEPS):
            instruction = self.code[place]
            holds = self.predicate(instruction.guard) if instruction.guard else True
            name, operands = instruction.name, instruction.operands
            self.issued.append((instruction, holds is not False))
            place += 1
            if name in ("BRA", "CALL", "EXIT"):  # ptxas also writes a jump as a call that does not return
                if name == "BRA":
                    for condition in filter(is_predicate, operands):
                        holds = both(holds, self.predicate(condition))
                if holds is None:
                    raise SassError(f"{instruction.address:x}: an unknown value decides {instruction.text}")
                if holds and name == "EXIT":
                    return self
                if holds and "DIV" not in instruction.kinds:
                    place = self.index[int(operands[-1], 16)]
            elif holds is None:
                self.forget(instruction)
            elif holds:
                self.execute(instruction)
        raise SassError("does not end")

    def execute(self, instruction: Instruction) -> None:
        if instruction.name == "LDGSTS":
            self.copies.append(self.place(instruction.operands[0]))
        if instruction.name in NOTHING:
            return
        run = getattr(self, f"do_{instruction.name.lower()}", None)
        if run is None:
            self.forget(instruction)
            return
        try:
            run(instruction.kinds, *instruction.operands)
        except SassError as error:
            raise SassError(f"{instruction.address:x}: {instruction.text}: {error}") from None

    def forget(self, instruction: Instruction) -> None:
        """What an instruction would write is unknown."""
        if instruction.name in NOTHING:
            return
        if instruction.name in ("STG", "HMMA", "RET"):
            raise SassError(f"{instruction.address:x}: not modelled: {instruction.text}")
        for target in instruction.operands:
            if is_predicate(target):
                self.set(target, None)
                continue
            wide = {"64", "WIDE"} & set(instruction.kinds)
            for k in range(4 if "128" in instruction.kinds else 2 if wide else 1):
                self.set(after(target, k), None)
            return

    def do_lds(self, kinds, target, source) -> None:
        place = self.place(source)
        for k in range(4 if "128" in kinds else 2 if "64" in kinds else 1):
            self.set(after(target, k), Loaded("word", place + 4 * k, 0))

    def do_ldsm(self, kinds, target, source) -> None:
        place, kind = self.place(source), "MT" if "MT88" in kinds else "M"
        for k in range(int(kinds[-1])):
            self.set(after(target, k), Loaded(kind, place, k))

    def do_stg(self, kinds, target, source) -> None:
        register, _, offset = re.search(r"\[([^\[\]]*)\]$", target)[1].partition("+")
        start = self.wide(register)
        if start is None:
            raise SassError("an unknown address")
        for k in range(4 if "128" in kinds else 2 if "64" in kinds else 1):
            value = 0 if source == "RZ" else self.values.get(after(source, k))
            self.stored[start + int(offset or "0", 16) + 4 * k] = value

    def do_hmma(self, kinds, target, a, b, c) -> None:
        factors = tuple(tuple(self.values.get(after(x, k)) for k in range(n)) for x, n in ((a, 4), (b, 2)))
        if not all(isinstance(value, Loaded) for factor in factors for value in factor):
            raise SassError(f"multiplies what was not loaded: {factors}")
        added = [0 if c == "RZ" else self.values.get(after(c, k)) for k in range(4)]
        before = None
        if added != [0, 0, 0, 0]:
            before = added[0].sum if isinstance(added[0], Element) else None
            if before is None or added != [Element(before, k) for k in range(4)]:
                raise SassError(f"adds to what is no sum: {added}")
            if before.continued:
                raise SassError("adds to a sum that was carried on elsewhere")
            before.continued = True
        self.all_sums.append(Sum(before, factors))
        for k in range(4):
            self.set(after(target, k), Element(self.all_sums[-1], k))
