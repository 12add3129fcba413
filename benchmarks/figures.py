"""The tables of docs/performance.md and the pictures, generated from the records: `make figures`.

    python benchmarks/figures.py            writes figures/*.png and the part of docs/performance.md between the markers
    python benchmarks/figures.py --check    fails if they are not up to date with the records
    python benchmarks/figures.py --train    first trains the demo's networks for the IoU of each level (minutes)

The metadata of a picture has, as "Rows", the hash of the data that it shows and of drawings.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import drawings

from unetpp_fast.benchmarking import records
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common.atomic_files import write_atomic
from unetpp_fast.common.extras import need
from unetpp_fast.experiments import demo

HERE = Path(__file__).parent
PAGE, PICTURES, TRAINED = HERE.parent / "docs/performance.md", HERE / "figures", HERE / "demo.json"
BEGIN, END = "<!-- measured: from here on written by `make figures` -->", "<!-- measured: up to here -->"
NO_GPU = "**No GPU figure has been recorded yet.** `make gpu-check OUT=folder`, on a machine with a GPU, records them."
ABOUT_PICTURES = (
    "In the pictures x is a median over ours; the tables take ratios round by round, which can differ in the last digits."
    " PyTorch is the faster of its two memory formats."
)
KINDS: dict[str, tuple[Callable, str]] = {
    "inference": (drawings.bars, "How long does the paper's UNet++ take for an image? float32, batch 1"),
    "training": (drawings.bars, "How long does a training step of the paper's UNet++ take? float32"),
    "memory": (drawings.bars_of_memory, "How much memory does a prediction by the paper's UNet++ take? float32, peak"),
    "training-memory": (drawings.bars_of_memory, "How much memory does a training step take? float32, peak"),
    "encoders": (drawings.bars, "How long does smp's UNet++ over an encoder take? float32, batch 1"),
    "batch": (drawings.bars, "What does a larger batch bring? Time per image, float32"),
    "levels": (drawings.levels, "What does each level of the pruned UNet++ cost, and what does it bring?"),
    "roofline": (drawings.roofline, "Every op under the measured ceilings"),
}
Rows = Sequence[Mapping]


def text(folder: Path = records.RESULTS, trained: Path = TRAINED) -> str:
    """The text between the markers: for each machine where, when and with what it was measured, its tables and pictures."""
    machines = records.read_all(folder)
    parts = [] if any(row["cuda"] for rows in machines.values() for row in rows) else [NO_GPU]
    for machine, rows in machines.items():
        parts += [f"### {rows[0]['device']}", _origin(rows)]
        parts += [table for table in (models_table(rows), kernels_table(rows)) if table]
        shown = [f"![{KINDS[name][1]}, {rows[0]['device']}](../benchmarks/figures/{name}-{machine}.png)"
                 for name in pictures_of(rows, iou_by_level(trained))]  # fmt: skip
        parts += [ABOUT_PICTURES, *shown] if shown else []
    return "\n\n".join(parts)


def _origin(rows: Rows) -> str:
    """The software, commits, days and sources of the rows."""

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows if row[key]}))

    software = [f"{name} {all_of(name)}" for name in ("torch", "triton", "cuda", "cudnn", "driver") if all_of(name)]
    days = ", ".join(sorted({row["date"][:10] for row in rows}))
    last = newest(rows)
    older = "; a row with † is of older ones" if any(row["source_hash"] != last for row in rows) else ""
    return (
        f"{'; '.join(software)}; commit {all_of('commit')}; {days}; sources `{last}`. A row is current as long as "
        f"`python -m unetpp_fast.info` prints this hash of the sources{older}. Milliseconds are "
        "medians, followed by the ratio to eager, taken round by round, and the peak memory."
    )


def newest(rows: Rows) -> str:
    """The hash of the sources of the latest row."""
    return max(rows, key=lambda row: row["date"])["source_hash"]


def models_table(rows: Rows) -> str:
    """A line per case, a column per implementation: median ms, ratio to eager, peak MB."""
    cases: dict[tuple, dict[str, dict]] = {}
    last = newest(rows)
    for row in rows:
        if row["bench"] in ("inference", "training", "memory"):
            what = row.get("memory_of") or row["bench"]
            key = what, row["model"], row["level"], row["mode"], "x".join(map(str, row["size"])), row["batch"], row["dtype"]
            cell = cases.setdefault(key, {}).setdefault(row["impl"], {})
            if row["bench"] != "memory":
                cell["ms"], cell["ratio"] = row["median_ms"], row["ratio_to"].get("eager")
            if row["peak_mb"] is not None:
                cell["mb"] = row["peak_mb"]
            cell["older"] = row["source_hash"] != last
    names = [name for name in IMPLEMENTATIONS if any(name in cells for cells in cases.values())]
    lines = ["| pass, network, size, batch, dtype | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for (what, model, level, mode, size, batch, dtype), cells in cases.items():
        label = f"{what}, {model} L{level} {mode}, {size}, {batch}, {dtype}"
        lines.append(f"| {label} | " + " | ".join(_cell(cells.get(name)) for name in names) + " |")
    return "\n".join(lines) if cases else ""


def _cell(cell: Mapping | None) -> str:
    if not cell:
        return ""
    time = f"{records.digits(cell['ms'])} ms" if "ms" in cell else ""
    ratio = f" ({cell['ratio']:.2f}x)" if cell.get("ratio") else ""
    memory = f"{cell['mb']:.0f} MB" if "mb" in cell else ""
    return ", ".join(part for part in (time + ratio, memory) if part) + (" †" if cell["older"] else "")


def kernels_table(rows: Rows) -> str:
    """A line per op and implementation."""
    lines = ["| op, level, size, batch, dtype | by | ms | over eager | TFLOP/s | GB/s | share of the ceiling |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in records.of_bench(rows, "kernel"):
        size = "x".join(map(str, row["size"]))
        ratio = f"{row['ratio_to']['eager']:.2f}" if "eager" in row["ratio_to"] else ""
        older = " †" if row["source_hash"] != newest(rows) else ""
        time = records.digits(row["median_ms"])
        lines.append(
            f"| {row['model']}, {row['level']}, {size}, {row['batch']}, {row['dtype']}{older} | {row['impl']} "
            f"| {time} | {ratio} | {row['tflops']:.1f} | {row['gb_s']:.0f} | {row['share_of_ceiling']:.0%} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def iou_by_level(path: Path = TRAINED) -> dict[int, float]:
    """The IoU of the demo's UNet++ pruned to each level, from a recorded training; {} if there is none."""
    if not path.exists():
        return {}
    prefix = "UNet++ L"
    return {
        int(row["name"][len(prefix) :]): row["iou"] for row in json.loads(path.read_text()) if row["name"].startswith(prefix)
    }


def pictures_of(rows: Rows, iou: Mapping[int, float]) -> dict[str, object]:
    """The data of each picture of a machine, as `drawings` selects them; pictures without data are omitted."""
    shown = {
        "inference": drawings.inference_panels(rows),
        "training": drawings.training_panels(rows),
        "memory": drawings.memory_panels(rows),
        "training-memory": drawings.memory_panels(rows, "training"),
        "encoders": drawings.encoder_panels(rows),
        "batch": drawings.batch_panels(rows),
        "levels": drawings.level_points(rows, iou),
        "roofline": drawings.roofline_points(rows),
    }
    return {name: what for name, what in shown.items() if what}


def digest(shown: object) -> str:
    """The hash of the data that a picture shows, and of how it is drawn."""
    drawing = Path(drawings.__file__).read_text()
    return hashlib.sha256((json.dumps(shown, sort_keys=True) + drawing).encode()).hexdigest()


def expected(folder: Path = records.RESULTS, trained: Path = TRAINED) -> dict[str, tuple[str, object, str]]:
    """By the file name of each picture: its kind, its data and its title."""
    wanted = {}
    for machine, rows in records.read_all(folder).items():
        for name, shown in pictures_of(rows, iou_by_level(trained)).items():
            wanted[f"{name}-{machine}.png"] = name, shown, f"{KINDS[name][1]}\n{rows[0]['device']}"
    return wanted


def write(page: Path = PAGE, pictures: Path = PICTURES, folder: Path = records.RESULTS, trained: Path = TRAINED) -> None:
    """Draws every picture whose data have changed, removes those without records, and writes the page."""
    wanted = expected(folder, trained)
    for path in Path(pictures).glob("*.png"):
        if path.name not in wanted:
            path.unlink()
    for name, (kind, shown, title) in wanted.items():
        if drawn_from(pictures / name) != digest(shown):
            KINDS[kind][0](pictures / name, shown, title, digest(shown))
    before, _, after = _split(page)
    content = f"{before}{BEGIN}\n\n{text(folder, trained)}\n\n{END}{after}"
    write_atomic(page, lambda stream: stream.write(content.encode()))


def check(
    page: Path = PAGE, pictures: Path = PICTURES, folder: Path = records.RESULTS, trained: Path = TRAINED
) -> list[str]:
    """What is not up to date with the records, one message per file."""
    messages = []
    if _split(page)[1].strip() != text(folder, trained):
        messages.append(f"{page.name} is not up to date with the records: run `make figures`")
    wanted = expected(folder, trained)
    for name, (_, shown, _) in wanted.items():
        if drawn_from(pictures / name) != digest(shown):
            messages.append(f"{name} is missing or was drawn from other rows: run `make figures`")
    messages += [f"{path.name} has no records" for path in Path(pictures).glob("*.png") if path.name not in wanted]
    return messages


def _split(page: Path) -> tuple[str, str, str]:
    """The text before, between and after the markers."""
    before, begin, rest = page.read_text().partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page} must have the lines {BEGIN} and {END}")
    return before, between, after


def drawn_from(path: Path) -> str | None:
    """The hash of the data that a picture was drawn from, None without a picture."""
    if not path.exists():
        return None
    with need("PIL.Image", "bench").open(path) as picture:
        return picture.text.get("Rows")


def train(path: Path = TRAINED) -> None:
    """Runs the demo and records its table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = demo.run(Path(folder))
    content = json.dumps(rows, indent=1) + "\n"
    write_atomic(path, lambda stream: stream.write(content.encode()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page or pictures are not up to date"
    )
    parser.add_argument("--train", action="store_true", help="train the demo's networks first")
    options = parser.parse_args()
    if options.check:
        wrong = check()
        print("\n".join(wrong) or "page and pictures are up to date with the records")
        return int(bool(wrong))
    if options.train:
        train()
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
