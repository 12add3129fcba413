"""What each picture shows of a machine's rows, and how it is drawn. The selected data are plain, so they can be hashed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.benchmarking.records import of_bench
from unetpp_fast.common.atomic_files import write_atomic
from unetpp_fast.common.extras import need

Rows = Sequence[Mapping]


def _label(row: Mapping) -> str:
    size = "x".join(map(str, row["size"]))
    return f"{row['bench']} {row['model']} L{row['level']} {row['mode']}\n{size}, batch {row['batch']}, {row['dtype']}"


def _in_order(names: set[str]) -> list[str]:
    return [name for name in IMPLEMENTATIONS if name in names]


def _colour(name: str) -> str:
    return IMPLEMENTATIONS[name].colour


def speedup_bars(rows: Rows) -> list[dict]:
    """For each timed case, the ratio of each implementation to eager."""
    cases: dict[str, dict[str, float]] = {}
    for row in [*of_bench(rows, "inference"), *of_bench(rows, "training")]:
        if "eager" in row["ratio_to"]:
            cases.setdefault(_label(row), {})[row["impl"]] = round(row["ratio_to"]["eager"], 4)
    return [{"case": case, "ratios": ratios} for case, ratios in cases.items()]


def batch_lines(rows: Rows) -> list[dict]:
    """Time per image and peak memory by batch, of cases that were measured at two batches or more."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        if row["bench"] == "kernel":
            continue
        what = row.get("memory_of") or row["bench"]
        key = what, row["model"], row["level"], row["mode"], tuple(row["size"]), row["dtype"], row["impl"]
        line = lines.setdefault(key, {"ms": {}, "mb": {}})
        if row["median_ms"] is not None:
            line["ms"][str(row["batch"])] = round(row["median_ms"] / row["batch"], 5)
        if row["peak_mb"] is not None:
            line["mb"][str(row["batch"])] = round(row["peak_mb"], 2)
    return [
        {"what": f"{what} {model} L{level} {mode} {'x'.join(map(str, size))} {dtype}", "impl": impl, **line}
        for (what, model, level, mode, size, dtype, impl), line in lines.items()
        if max(len(line["ms"]), len(line["mb"])) > 1
    ]


def level_points(rows: Rows, iou: Mapping[int, float]) -> list[dict]:
    """Time and IoU of the paper's network pruned to each level, with one head, if all four levels were measured."""
    groups: dict[tuple, dict[int, float]] = {}
    for row in of_bench(rows, "inference"):
        if row["model"] == "unet++" and row["mode"] == "fast" and row["level"] in iou:
            key = tuple(row["size"]), row["batch"], row["dtype"], row["impl"]
            groups.setdefault(key, {})[row["level"]] = row["median_ms"]
    return [
        {"what": f"{'x'.join(map(str, size))}, batch {batch}, {dtype}", "impl": impl,
         "points": [[level, round(ms, 4), round(iou[level], 5)] for level, ms in sorted(times.items())]}
        for (size, batch, dtype, impl), times in groups.items() if len(times) == 4
    ]  # fmt: skip


def roofline_points(rows: Rows) -> list[dict]:
    """FLOP per byte and TFLOP/s of each op, and the ceilings measured in its run."""
    return [
        {"op": f"{row['model']} L{row['level']}", "impl": row["impl"], "dtype": row["dtype"],
         "intensity": round(row["flop"] / row["bytes"], 4), "tflops": round(row["tflops"], 4),
         "ceilings": [round(row["ceiling_tflops"], 3), round(row["ceiling_gb_s"], 1)]}
        for row in of_bench(rows, "kernel")
    ]  # fmt: skip


def _figure(columns: int, width: float, height: float):
    figure = need("matplotlib.figure", "bench").Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, path: Path, rows: str) -> None:
    """Saves with a palette of 64 colours, which keeps the file small."""
    image, stream = need("PIL.Image", "bench"), io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    metadata = need("PIL.PngImagePlugin", "bench").PngInfo()
    metadata.add_text("Rows", rows)
    picture = image.open(stream).convert("RGB").quantize(64)
    write_atomic(path, lambda file: picture.save(file, format="PNG", optimize=True, pnginfo=metadata))


def speedup(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """Bars, one group per case."""
    names = _in_order({name for case in shown for name in case["ratios"]})
    figure, (axis,) = _figure(1, 8.0, 1.2 + 0.16 * len(shown) * (len(names) + 1))
    place, ticks = 0.0, []
    for case in shown:
        mine = [name for name in names if name in case["ratios"]]
        ticks.append((place + (len(mine) - 1) / 2, case["case"]))
        for name in mine:
            axis.barh(place, case["ratios"][name], color=_colour(name), height=0.9)
            axis.annotate(f" {case['ratios'][name]:.2f}", (case["ratios"][name], place), va="center", fontsize=6)
            place += 1
        place += 1
    for name in names:
        axis.barh(0, 0, color=_colour(name), label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("time of eager / time of this one")
    axis.legend(fontsize=7)
    axis.set_title(title, fontsize=9)
    _save(figure, path, rows)


def against_batch(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """Time per image on the left, peak memory on the right."""
    figure, axes = _figure(2, 10.0, 4.0)
    styles = dict(zip(dict.fromkeys(line["what"] for line in shown), ("-", "--", ":", "-.") * len(shown), strict=False))
    for axis, key, label in zip(axes, ("ms", "mb"), ("ms per image", "peak MB"), strict=True):
        for line in shown:
            points = sorted((int(batch), value) for batch, value in line[key].items())
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linestyle=styles[line["what"]],
                          color=_colour(line["impl"]), label=f"{line['impl']}, {line['what']}")  # fmt: skip
        axis.set(xlabel="batch", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=5)
    figure.suptitle(title, fontsize=9)
    _save(figure, path, rows)


def levels(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """A line per implementation, a point per level."""
    settings = list(dict.fromkeys(line["what"] for line in shown))
    figure, axes = _figure(len(settings), 5.0 * len(settings) + 1, 4.0)
    for axis, setting in zip(axes, settings, strict=True):
        for line in [line for line in shown if line["what"] == setting]:
            times, scores = [point[1] for point in line["points"]], [point[2] for point in line["points"]]
            axis.plot(times, scores, marker="o", color=_colour(line["impl"]), label=line["impl"])
            for level, ms, score in line["points"]:
                axis.annotate(f"L{level}", (ms, score), xytext=(3, 4), textcoords="offset points", fontsize=7)
        axis.set(xlabel="ms (median)", ylabel="IoU of the demo's network (half the width)", title=setting)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    _save(figure, path, rows)


def roofline(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """A point per op; the ceilings of each precision as lines."""
    figure, (axis,) = _figure(1, 8.0, 5.0)
    for dtype in dict.fromkeys(point["dtype"] for point in shown):
        tflops, gb_s = next(point["ceilings"] for point in shown if point["dtype"] == dtype)
        knee = 1e3 * tflops / gb_s
        axis.plot([0.1, knee, 1e4], [0.1 * gb_s / 1e3, tflops, tflops], linewidth=0.8, label=f"ceiling, {dtype}")
    markers = dict(zip(dict.fromkeys(point["op"].split()[0] for point in shown), "osv^D<>*Pph8X1234" * 9, strict=False))
    for point in shown:
        kind = point["op"].split()[0]
        axis.plot(point["intensity"], point["tflops"], marker=markers[kind], markersize=5, color=_colour(point["impl"]))
    for kind, marker in markers.items():
        axis.plot([], [], marker=marker, linestyle="", color="black", markersize=5, label=kind)
    for name in _in_order({point["impl"] for point in shown}):
        axis.plot([], [], marker="s", linestyle="", color=_colour(name), label=name)
    axis.set(xlabel="FLOP per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.legend(fontsize=6, ncols=2)
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=9)
    _save(figure, path, rows)
