"""Whether a compiled CUDA kernel multiplies what it must."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

from support.sass.listing import Instruction
from support.sass.products import Conv, Wgrad
from support.sass.registers import Element, SassError
from support.sass.thread import Thread


def packed_arguments(given: list[tuple[str, dict, int]], sources: Path, compiler: str, folder: Path) -> list[bytes]:
    """Arguments, each a struct of `csrc/kernels.h`, its members and the bytes of a value, as the bytes that a kernel takes;
    written by C++."""
    lines = ['#include "kernels.h"', "#include <cstdio>", "int main() {"]
    for struct, members, size in given:
        lines += ["  {", f"    {struct} p;"]
        lines += [f"    p.{name} = (decltype(p.{name})){value}ll;" for name, value in members.items()]
        lines += [f"    p.prepare({size});", "    const long long size = sizeof(p);", "    fwrite(&size, 8, 1, stdout);"]
        lines += ["    fwrite(&p, sizeof(p), 1, stdout);", "  }"]
    (folder / "pack.cpp").write_text("\n".join([*lines, "}", ""]))
    subprocess.run([compiler, "-std=c++17", f"-I{sources}", folder / "pack.cpp", "-o", folder / "pack"], check=True)
    data = subprocess.run([folder / "pack"], check=True, capture_output=True).stdout
    found = []
    for _ in given:
        size = int.from_bytes(data[:8], "little")
        found.append(data[8 : 8 + size])
        data = data[8 + size :]
    return found


def wrong(instance: Conv | Wgrad, code: list[Instruction], architecture: int, arguments: bytes, thread: int) -> str:
    """What is wrong with the products of a thread, "" if nothing is."""
    try:
        done = Thread(code, architecture, arguments, thread).run()
    except SassError as error:
        return str(error)
    pixel, piece = divmod(thread, 4)
    tile = instance.first
    row, column = divmod(pixel, tile.columns // 16 * 16)
    start = done.copies[0] - tile.at(row, tile.place(column), piece)  # of shared memory
    found = {ended: tuple(sorted(_moved(ended.products(), start))) for ended in done.sums}
    expected = instance.expected(thread)
    if isinstance(instance, Conv):
        sums = Counter(found.values())
        return _difference([*(expected - sums).elements()], [*(sums - expected).elements()])
    stored = {
        place: (found.get(value.sum), value.place) if isinstance(value, Element) else (None, 0)
        for place, value in done.stored.items()
    }
    if stored.keys() != expected.keys():
        return f"{len(stored.keys() ^ expected.keys())} sums are stored elsewhere"
    if any(found and found[1] != expected[place][1] for place, found in stored.items()):
        return "the values of a sum are stored in another order"
    places = [place for place in expected if stored[place] != expected[place]]
    return _difference([expected[place][0] for place in places], [stored[place][0] or () for place in places])


def _moved(products: list[tuple], start: int) -> list[tuple]:
    """With addresses from the start of shared memory."""
    return [tuple(tuple(x._replace(address=x.address - start) for x in factor) for factor in one) for one in products]


def _difference(expected: list[tuple], found: list[tuple]) -> str:
    if not expected and not found:
        return ""
    first, other = (Counter(sums[0] if sums else ()) for sums in (expected, found))
    lacks, more = (first - other).total(), (other - first).total()
    return f"{len(expected)} sums are not there; one lacks {lacks} products and has {more} others"
