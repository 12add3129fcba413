"""ncnn and MNN, as builders of `implementations.py`: runtimes made for phones that also run on desktop CPUs, in float32.

Both use Winograd's minimal filtering with transforms that lose more digits than PyTorch's sums; rows state every error.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..models.network import Network
from .case import Case, Prepared, Unavailable, load
from .runtimes import onnx_bytes

# The converter itself: MNN's command around it installs packages and reports its use.
MNN_CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def _converted(network: Network, x: Tensor, case: Case, command: Sequence[str], result: str) -> tempfile.TemporaryDirectory:
    """A folder with `result`, which `command` made there of `model.onnx`.

    Raises:
        Unavailable: the converter failed.
    """
    if case.dtype != "float32":
        raise Unavailable("it is measured in float32 only")
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "model.onnx").write_bytes(onnx_bytes(network, x, case))
    done = subprocess.run(command, cwd=folder.name, capture_output=True, encoding="utf-8", errors="replace")
    if not (Path(folder.name) / result).exists():
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        raise Unavailable(f"its converter failed: {lines[-1]}")
    return folder


def ncnn(network: Network, x: Tensor, case: Case) -> Prepared:
    """ncnn in float32, with as many threads as torch. It has no batches: images run one after another."""
    runtime, converter = load("ncnn", "bench"), load("pnnx", "bench")
    command = [converter.EXEC_PATH, "model.onnx", "fp16=0"]
    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads()
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    with _converted(network, x[:1], case, command, "model.ncnn.bin") as folder:
        net.load_param(f"{folder}/model.ncnn.param")
        net.load_model(f"{folder}/model.ncnn.bin")
    source, heads = x.contiguous().numpy(), len(net.output_names())

    def forward(_: Tensor) -> list[Tensor]:
        images = []
        for image in source:
            extractor = net.create_extractor()
            extractor.input("in0", runtime.Mat(image))
            images.append([numpy.array(extractor.extract(f"out{head}")[1]) for head in range(heads)])
        return [torch.from_numpy(numpy.stack(maps)) for maps in zip(*images, strict=True)]

    return Prepared(forward, x, capturable=False)


def mnn(network: Network, x: Tensor, case: Case) -> Prepared:
    """MNN at its "high" precision, which is float32, with as many threads as torch."""
    load("MNN", "bench")
    expressions, networks = load("MNN.expr"), load("MNN.nn")
    command = [sys.executable, "-c", MNN_CONVERT, "-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "model.mnn"]
    settings = {"backend": "CPU", "precision": "high", "numThread": torch.get_num_threads()}
    with _converted(network, x, case, [*command, "--bizCode", "unetpp_fast"], "model.mnn") as folder:
        manager = networks.create_runtime_manager((settings,))
        module = networks.load_module_from_file(f"{folder}/model.mnn", [], [], runtime_manager=manager)
    source = expressions.const(x.contiguous().numpy(), list(x.shape), expressions.NCHW)

    def forward(_: Tensor) -> list[Tensor]:
        results = module.onForward([source])
        return [torch.from_numpy(expressions.convert(result, expressions.NCHW).read()) for result in results]

    return Prepared(forward, x, capturable=False)
