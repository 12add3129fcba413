"""What a user would take instead, where it imports: MONAI's and smp's own modules, and the runtimes.

Each is a builder as in `unetpp_fast.bench`: from a network, an input and a case to something that runs, or `Unavailable`
with the reason. Runtimes read the network as ONNX; peers run the weights that the network was converted from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import warnings
from collections.abc import Callable
from types import ModuleType

import cases
import torch
from torch import Tensor

from unetpp_fast.benchmarking import harness
from unetpp_fast.benchmarking.harness import Builder, Case, Prepared, Unavailable
from unetpp_fast.models.network import Network


def builders() -> dict[str, Builder]:
    """Every implementation by the name that rows give it."""
    peers = {
        "monai": functools.partial(peer, make=cases.monai_module),
        "smp": functools.partial(peer, make=cases.smp_module),
    }
    return harness.builders() | peers | {"onnxruntime": onnxruntime, "openvino": openvino, "tensorrt": tensorrt}


def get(name: str) -> Builder:
    """The builder of an implementation; one that says so where this version does not have it."""
    return builders().get(name, functools.partial(missing, name=name))


def missing(network: Network, x: Tensor, case: Case, name: str) -> Prepared:
    raise Unavailable(f"this version has no {name.partition('-')[2]} backend")


def load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that is there may still fail to import
        raise Unavailable(f"{module} does not import: {str(error).splitlines()[0]}") from error


def peer(network: Network, x: Tensor, case: Case, make: Callable) -> Prepared:
    """The peer's own module, with the weights that the network has: both were made from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().to(x.device)
    prepared = harness.prepare(module, x, case)
    prepared.ours = False
    return prepared


def onnx_bytes(network: Network, x: Tensor, case: Case) -> bytes:
    """The network as ONNX for inputs of just this size."""
    if case.training:
        raise Unavailable("it does not train")
    load("onnxscript")
    model = harness.with_backend(network, "reference").eval().to("cpu", case.torch_dtype)
    stream = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x.to("cpu", case.torch_dtype),), stream, dynamo=True, verbose=False)
    return stream.getvalue()


def onnxruntime(network: Network, x: Tensor, case: Case) -> Prepared:
    """ONNX Runtime: on a CPU with as many threads as torch, on a GPU with inputs and outputs that stay there."""
    runtime = load("onnxruntime")
    if case.dtype != "float32" and x.device.type == "cpu":
        raise Unavailable(f"it has no {case.dtype} convolution on a CPU")
    wanted = "CUDAExecutionProvider" if x.device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in runtime.get_available_providers():
        raise Unavailable(f"this build of it has no {wanted}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(onnx_bytes(network, x, case), options, providers=[wanted])
    binding = session.io_binding()
    outputs = [torch.empty((x.shape[0], network.out_channels, *x.shape[2:]), dtype=case.torch_dtype, device=x.device)
               for _ in session.get_outputs()]  # fmt: skip
    source = x.to(case.torch_dtype).contiguous()
    element = {"float32": 1, "float16": 10, "bfloat16": 16}[case.dtype]  # of onnx.TensorProto
    binding.bind_input(session.get_inputs()[0].name, x.device.type, 0, element, list(source.shape), source.data_ptr())
    for node, output in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(node.name, x.device.type, 0, element, list(output.shape), output.data_ptr())

    def forward(_: Tensor) -> list[Tensor]:
        session.run_with_iobinding(binding)
        return outputs

    forward.source = source  # its address is bound
    return Prepared(forward, x, capturable=False)


def openvino(network: Network, x: Tensor, case: Case) -> Prepared:
    """OpenVINO for latency, in the case's precision, with as many threads as torch."""
    runtime = load("openvino")
    if x.device.type != "cpu":
        raise Unavailable("it runs on a CPU")
    if case.dtype == "float16":
        raise Unavailable("it has no float16 convolution on a CPU")
    core = runtime.Core()
    model = core.read_model(onnx_bytes(network, x, dataclasses.replace(case, dtype="float32")), b"")
    precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    source = x.contiguous().numpy()
    request.set_input_tensor(runtime.Tensor(source, shared_memory=True))

    def forward(_: Tensor) -> list[Tensor]:
        request.infer()
        return [torch.from_numpy(request.get_output_tensor(index).data) for index in range(len(model.outputs))]

    return Prepared(forward, x, capturable=False)


def tensorrt(network: Network, x: Tensor, case: Case) -> Prepared:
    """TensorRT through Torch-TensorRT, at the case's precision."""
    if x.device.type != "cuda":
        raise Unavailable("it runs on an NVIDIA GPU")
    if case.training:
        raise Unavailable("it does not train")
    runtime = load("torch_tensorrt")
    model = harness.with_backend(network, "reference").eval().to(case.torch_dtype)
    x = x.to(case.torch_dtype)
    return Prepared(runtime.compile(model, ir="dynamo", inputs=[x], enabled_precisions={case.torch_dtype}), x)
