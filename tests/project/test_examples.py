"""The recipes in `examples/` run and return what the network returns."""

from __future__ import annotations

import http.client
import importlib
import io
import os
import shutil
import struct
import sysconfig
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import COMPILED, assert_close_relative, build, make_input

import unetpp_fast as uf
from unetpp_fast.data import images
from unetpp_fast.data.images import read_image
from unetpp_fast.examples import export_aoti, serve
from unetpp_fast.experiments import demo
from unetpp_fast.training.checkpoint import save_checkpoint

# torch's own exporters and compilers warn about parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")


def network() -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 1, 2, features=(3, 4, 5), deep_supervision=True).eval()


def test_onnx_takes_any_batch_and_size(tmp_path):
    for module in ("onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="exports to ONNX and runs it")
    recipe = importlib.import_module("unetpp_fast.examples.export_onnx")
    model = network()
    session = recipe.export(model, tmp_path / "model.onnx", level=1)
    for batch, size in ((1, (8, 20)), (3, (12, 6))):
        image = make_input(batch, 1, *size)
        (probabilities,) = session.run(["probabilities"], {"image": image.numpy()})
        assert_close_relative(torch.from_numpy(probabilities), model.predict(image, mode="fast", level=1), COMPILED)


def test_aoti_takes_any_batch_and_size(tmp_path):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("AOTInductor needs a C++ compiler: g++, or another named in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("AOTInductor needs Python's headers")
    model = build(uf.UNetPlusPlus, 1, 1, features=(3, 4)).eval()
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    loaded = export_aoti.export(model, tmp_path / "model.pt2", **quick)
    image = make_input(3, 1, 10, 26)
    with torch.no_grad():
        assert_close_relative(loaded(image), model.predict(image), COMPILED)


@pytest.fixture
def address(tmp_path):
    """Host and port of a server that runs in a thread."""
    model = network()
    save_checkpoint(tmp_path / "m.pt", {"config": model.config, "model": model.state_dict(), "about": {}})
    server = serve.make_server(tmp_path / "m.pt", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address
    server.shutdown()
    server.server_close()
    thread.join()


def post(address: tuple[str, int], body: bytes, headers: dict | None = None) -> tuple[int, str, bytes]:
    """Status, reason and body of the response."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.putrequest("POST", "/")
    for name, value in ({"Content-Length": str(len(body))} if headers is None else headers).items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    result = answer.status, answer.reason, answer.read()
    connection.close()
    return result


def test_the_server_answers_a_picture_with_its_mask(address, capfd):
    path = demo.example("nuclei/image.png")
    status, _, body = post(address, path.read_bytes())
    assert status == 200
    mask = np.asarray(Image.open(io.BytesIO(body)))
    expected = network().predict(torch.from_numpy(images.standardise(read_image(path)))[None])[0, 0] > 0.5
    assert 0 < expected.sum() < expected.numel()
    assert np.array_equal(mask, expected.numpy() * np.uint8(255))


def bomb() -> bytes:
    """A PNG of a few bytes that claims 10^10 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0" * 12


def colour() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 411, "Content-Length"),
        (b"", {"Content-Length": "-1"}, 411, "Content-Length"),
        (b"", {"Content-Length": str(2**40)}, 413, "more than"),
        (b"GIF89a", None, 400, "is not a PNG"),
        (bomb(), None, 400, "100000x100000 is more than"),
        (colour()[:-30], None, 400, "cannot be read"),
        (colour(), None, 400, "expected 1 channels, got 3"),
    ],
)
def test_the_server_says_what_is_wrong(address, body, headers, status, says, capfd):
    given, reason, _ = post(address, body, headers)
    assert given == status and says in reason


def test_an_encoder_with_deep_supervision_and_without(monkeypatch):
    from support.encoders import Pyramid

    recipe = importlib.import_module("unetpp_fast.examples.encoder_nuclei")
    monkeypatch.setattr(demo, "STEPS_PER_EPOCH", 1)
    scores = recipe.main(Pyramid(1, (3, 4, 5), 2), 1, encoder_depth=3, decoder_channels=(4, 4, 3))
    assert list(scores) == [
        "deep supervision", "deep supervision, prune(1)", "deep supervision, prune(2)", "one head",
    ]  # fmt: skip
    assert all(0 <= iou <= 1 for iou in scores.values())
