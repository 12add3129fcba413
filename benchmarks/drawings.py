"""What each picture shows of a machine's rows, and how it is drawn. The selected data are plain, so they can be hashed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.benchmarking.records import of_bench
from unetpp_fast.common.atomic_files import write_atomic
from unetpp_fast.common.extras import need

Rows = Sequence[Mapping]


OURS, THEIRS, RECOMPUTED = "#d9483b", "#b9c1ca", "#efa79f"
TEXT, SOFT = "#1d232b", "#66707c"
MOST_PANELS = 3
# Implementations that are one thing to a reader, by the name that a picture shows; of several the faster one counts.
NAMES = {
    "fused": "unetpp_fast", "fused-cpu": "unetpp_fast", "fused-cuda": "unetpp_fast", "fused-triton": "unetpp_fast",
    "fused-cpu-recompute": "unetpp_fast, recompute", "eager": "PyTorch", "eager-channels-last": "PyTorch",
    "compile": "torch.compile", "compile-max-autotune": "torch.compile", "monai": "MONAI", "smp": "smp",
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn", "mnn": "MNN", "tensorrt": "TensorRT",
}  # fmt: skip


def _in_order(names: set[str]) -> list[str]:
    return [name for name in IMPLEMENTATIONS if name in names]


def _shown(name: str) -> str:
    return NAMES.get(name, name)


def _tint(shown: str) -> str:
    """The colour of a name in a picture: ours has one of its own."""
    return {"unetpp_fast": OURS, "unetpp_fast, recompute": RECOMPUTED}.get(shown, THEIRS)


def _colour(name: str) -> str:
    return IMPLEMENTATIONS[name].colour


def _size(row: Mapping) -> str:
    return "x".join(map(str, row["size"]))


def _panels(rows: Rows, title: Callable[[Mapping], str], key: str, most: int = MOST_PANELS) -> list[dict]:
    """A panel per title with the least value of each name, where ours and another are among them; of many the first, the
    last and those evenly between."""
    panels: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: (math.prod(row["size"]), row["batch"])):
        if row[key] is not None:
            bars = panels.setdefault(title(row), {})
            name = _shown(row["impl"])
            bars[name] = min(round(row[key], 4), bars.get(name, math.inf))
    kept = [{"panel": what, "bars": bars} for what, bars in panels.items() if len(bars) > 1 and "unetpp_fast" in bars]
    if len(kept) <= most:
        return kept
    return [kept[round(index * (len(kept) - 1) / (most - 1))] for index in range(most)]


def _papers(rows: Rows, **wanted: object) -> list[Mapping]:
    """Rows of the paper's network, all levels, in float32."""
    wanted = {"model": "unet++", "level": 4, "dtype": "float32", **wanted}
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def inference_panels(rows: Rows) -> list[dict]:
    """Milliseconds of an image by its size; the head of the last level alone."""
    return _panels(_papers(of_bench(rows, "inference"), mode="fast", batch=1), lambda row: f"{_size(row)}", "median_ms")


def training_panels(rows: Rows) -> list[dict]:
    """Milliseconds of a training step."""
    found = [row for row in _papers(of_bench(rows, "training")) if row["impl"] != "fused-cpu-recompute"]
    return _panels(found, lambda row: f"{_size(row)}, batch {row['batch']}", "median_ms")


def memory_panels(rows: Rows, what: str = "inference") -> list[dict]:
    """Peak memory in MB of predictions, or of training steps."""
    found = [row for row in _papers(rows) if (row.get("memory_of") or row["bench"]) == what]
    return _panels(found, lambda row: f"{_size(row)}, batch {row['batch']}", "peak_mb")


def encoder_panels(rows: Rows) -> list[dict]:
    """Milliseconds of smp's network over each encoder, at the largest size that was measured."""
    prefix = "smp-unet++-"
    found = [row for row in of_bench(rows, "inference") if row["model"].startswith(prefix)]
    largest = max((math.prod(row["size"]) for row in found), default=0)
    found = [row for row in found if math.prod(row["size"]) == largest]
    return _panels(found, lambda row: f"{row['model'][len(prefix) :]}, {_size(row)}", "median_ms", most=4)


def batch_panels(rows: Rows) -> list[dict]:
    """Milliseconds per image of the largest size that was measured at several batches, a panel for each batch."""
    found = _papers(of_bench(rows, "inference"), mode="fast")
    batches: dict[int, set[int]] = {}
    for row in found:
        batches.setdefault(math.prod(row["size"]), set()).add(row["batch"])
    several = [pixels for pixels, of in batches.items() if len(of) > 1]
    chosen = [row for row in found if several and math.prod(row["size"]) == max(several)]
    each = [{**row, "median_ms": row["median_ms"] / row["batch"]} for row in chosen]
    panels = _panels(each, lambda row: f"{_size(row)}, batch {row['batch']}", "median_ms")
    return panels if len(panels) > 1 else []


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
    figure.savefig(stream, format="png", dpi=100)
    metadata = need("PIL.PngImagePlugin", "bench").PngInfo()
    metadata.add_text("Rows", rows)
    picture = image.open(stream).convert("RGB").quantize(64)
    write_atomic(path, lambda file: picture.save(file, format="PNG", optimize=True, pnginfo=metadata))


def bars(path: Path, shown: list[dict], title: str, rows: str, unit: str = "ms") -> None:
    """A panel for each case, a bar for each name in the same order everywhere, ours in its colour; times as many as ours."""
    totals = {name: max(panel["bars"].get(name, 0) / panel["bars"]["unetpp_fast"] for panel in shown) for name in
              dict.fromkeys(name for panel in shown for name in panel["bars"])}  # fmt: skip
    names = sorted(totals, key=lambda name: (not name.startswith("unetpp_fast"), name != "unetpp_fast", totals[name]))
    figure, axes = _figure(len(shown), 9.2, 0.95 + 0.29 * len(names))
    for axis, panel in zip(axes, shown, strict=True):
        values = panel["bars"]
        most = max(values.values())
        for place, name in enumerate(names):
            if name not in values:
                axis.text(0, place, " not measured", va="center", fontsize=8, color=SOFT, style="italic")
                continue
            axis.barh(place, values[name], color=_tint(name), height=0.74)
            ratio = f"  {values[name] / values['unetpp_fast']:.2f}x" if name != "unetpp_fast" else ""
            axis.text(
                values[name] + 0.02 * most, place, f"{_number(values[name])} {unit}{ratio}", va="center", fontsize=8.5,
                color=TEXT, fontweight="bold" if name == "unetpp_fast" else "normal",
            )  # fmt: skip
        axis.set_xlim(0, 1.75 * most if len(shown) > 2 else 1.45 * most)
        axis.set_title(panel["panel"], fontsize=10, color=TEXT, loc="left")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=9)
        axis.set_xticks([])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11, color=TEXT, x=0.01, ha="left")
    _save(figure, path, rows)


def bars_of_memory(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """`bars` of megabytes."""
    bars(path, shown, title, rows, "MB")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def levels(path: Path, shown: list[dict], title: str, rows: str) -> None:
    """Our times and scores of every level, of the largest image that was measured; those of the others beside them."""
    setting = max(shown, key=lambda line: (_shown(line["impl"]) == "unetpp_fast", line["points"][-1][1]))["what"]
    figure, (axis,) = _figure(1, 9.2, 3.4)
    lines: dict[str, dict] = {}
    for line in [line for line in shown if line["what"] == setting]:
        name = _shown(line["impl"])
        if name not in lines or line["points"][-1][1] < lines[name]["points"][-1][1]:
            lines[name] = line
    for name, line in lines.items():
        ours = name == "unetpp_fast"
        times, scores = [point[1] for point in line["points"]], [point[2] for point in line["points"]]
        axis.plot(times, scores, marker="o", color=_tint(name), label=name, linewidth=2.2 if ours else 1.4, zorder=2 + ours)
        for level, ms, score in line["points"] if ours or "unetpp_fast" not in lines else ():
            text = f"L{level}, {_number(ms)} ms"
            axis.annotate(text, (ms, score), xytext=(6, 6), textcoords="offset points", fontsize=9, color=TEXT)
    axis.set_xlabel("ms for an image (median)", fontsize=9)
    axis.set_ylabel("IoU of the demo's network", fontsize=9)
    axis.set_xlim(left=0)
    axis.margins(x=0.14, y=0.18)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axis.legend(fontsize=9, frameon=False)
    axis.set_title(f"{title}, {setting}", fontsize=11, color=TEXT, loc="left")
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
