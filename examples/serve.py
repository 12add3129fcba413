"""A small HTTP server: POST a PNG, get the mask of the first class as a PNG. It listens on this machine only.

python -m unetpp_fast.examples.serve RUN/best.pt 8080
curl --data-binary @image.png http://127.0.0.1:8080/ > mask.png
"""

import io
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unetpp_fast.common import errors
from unetpp_fast.data import images
from unetpp_fast.training.checkpoint import load_model

MAX_BYTES, MAX_PIXELS = 2**24, 2**22


def predict(network: torch.nn.Module, body: bytes) -> bytes:
    """The mask of the first class as a PNG, or the label map of exclusive classes, from the bytes of a PNG.

    Raises:
        ValueError: the image cannot be used; the message gives the reason.
    """
    if body[:8] != b"\x89PNG\r\n\x1a\n" or len(body) < 33:
        raise ValueError("the body is not a PNG")
    _check_size(*struct.unpack(">II", body[16:24]))  # before anything is decompressed
    try:
        _check_size(*Image.open(io.BytesIO(body)).size)  # a second header may have changed it
    except OSError as error:
        raise ValueError("the body is a PNG that cannot be read") from error
    image = images.read_normalised(io.BytesIO(body), network.normalisation or images.STANDARD)
    probabilities = network.predict(torch.from_numpy(image)[None])
    if network.exclusive:
        mask = probabilities[0].argmax(dim=0).to(torch.uint8).numpy()
    else:
        mask = (probabilities[0, 0] > 0.5).numpy() * np.uint8(255)
    Image.fromarray(mask).save(stream := io.BytesIO(), format="PNG")
    return stream.getvalue()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is more than {MAX_PIXELS} pixels")


def make_server(checkpoint: Path, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; loading the checkpoint runs no code from it.

    Raises:
        InputError: the checkpoint was trained on images that were scaled, or on Hounsfield units, which no PNG holds.
    """
    (network, content), lock = load_model(checkpoint), threading.Lock()
    if preparation := content.get("about", {}).get("prepare"):
        raise errors.InputError(f"{checkpoint} needs images prepared by {preparation}: add that here")

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds without a byte

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                return self.send_error(411, "Content-Length is missing")
            if int(length) > MAX_BYTES:
                return self.send_error(413, f"more than {MAX_BYTES} bytes")
            try:
                body = self.rfile.read(int(length))  # before the lock, so a slow client does not block others
                with lock:
                    answer = predict(network, body)
            except ValueError as error:
                return self.send_error(400, str(error).split("\n")[0])
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(answer)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_server(Path(sys.argv[1]), int(sys.argv[2])).serve_forever()
