"""ONNX Runtime, OpenVINO and TensorRT, as builders of `implementations.py`. The first two read the network as ONNX."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings

import torch
from torch import Tensor

from ..models.network import Network
from .case import Case, Prepared, Unavailable, load, with_backend

ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # of onnx.TensorProto
OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def onnx_bytes(network: Network, x: Tensor, case: Case) -> bytes:
    """The network as ONNX, for inputs of exactly this shape."""
    model = with_backend(network, "reference").eval().to("cpu", case.torch_dtype)
    stream = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x.to("cpu", case.torch_dtype),), stream, dynamo=True, verbose=False)  # type: ignore[arg-type]
    return stream.getvalue()


def onnxruntime(network: Network, x: Tensor, case: Case) -> Prepared:
    """ONNX Runtime: on a CPU with as many threads as torch, on a GPU with inputs and outputs in its memory."""
    runtime = load("onnxruntime", "bench")
    if case.dtype != "float32" and x.device.type == "cpu":
        raise Unavailable(f"it has no {case.dtype} convolution on a CPU")
    provider = "CUDAExecutionProvider" if x.device.type == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Unavailable(f"this build of it has no {provider}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(onnx_bytes(network, x, case), options, providers=[provider])
    binding = session.io_binding()
    outputs = [torch.empty((x.shape[0], network.out_channels, *x.shape[2:]), dtype=case.torch_dtype, device=x.device)
               for _ in session.get_outputs()]  # fmt: skip
    source = x.to(case.torch_dtype).contiguous()
    element = ONNX_TYPES[case.dtype]
    binding.bind_input(session.get_inputs()[0].name, x.device.type, 0, element, list(source.shape), source.data_ptr())
    for node, output in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(node.name, x.device.type, 0, element, list(output.shape), output.data_ptr())

    def forward(_: Tensor) -> list[Tensor]:
        session.run_with_iobinding(binding)
        return outputs

    forward.source = source  # type: ignore[attr-defined]  # keeps the tensor alive: the session holds only its address
    return Prepared(forward, x, capturable=False)


def openvino(network: Network, x: Tensor, case: Case) -> Prepared:
    """OpenVINO, tuned for latency, in the case's precision and with as many threads as torch."""
    runtime = load("openvino", "bench")
    if case.dtype not in OPENVINO_TYPES:
        raise Unavailable(f"it has no {case.dtype} convolution on a CPU")
    core = runtime.Core()
    model = core.read_model(onnx_bytes(network, x, dataclasses.replace(case, dtype="float32")), b"")
    settings = {"INFERENCE_PRECISION_HINT": OPENVINO_TYPES[case.dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    source = x.contiguous().numpy()
    request.set_input_tensor(runtime.Tensor(source, shared_memory=True))

    def forward(_: Tensor) -> list[Tensor]:
        request.infer()
        return [torch.from_numpy(request.get_output_tensor(index).data) for index in range(len(model.outputs))]

    return Prepared(forward, x, capturable=False)


def tensorrt(network: Network, x: Tensor, case: Case) -> Prepared:
    """TensorRT through Torch-TensorRT, in the case's precision."""
    runtime = load("torch_tensorrt")
    model = with_backend(network, "reference").eval().to(case.torch_dtype)
    x = x.to(case.torch_dtype)
    return Prepared(runtime.compile(model, ir="dynamo", inputs=[x], enabled_precisions={case.torch_dtype}), x)
