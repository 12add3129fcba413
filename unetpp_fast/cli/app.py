"""`unetpp-fast app`."""

from __future__ import annotations

import argparse

from ..architecture.precision import choose_dtype
from ..common.devices import choose_device
from ..webapp import interface, models
from .arguments import Commands, add_command, add_device

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_parser(commands: Commands) -> None:
    """Adds `app` to the commands."""
    text = "Serve a page to try a model: an image in, its mask, and the time of every level."
    command = add_command(commands, "app", run, text, usage="[--model RUN]")
    app = command.add_argument_group("page")
    app.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help="the folder of a training or a cross-validation, a checkpoint of any UNet++, or owner/name on the Hub; several"
        " predict together (default: none; the page offers to train a small one)",
    )  # fmt: skip
    app.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; at another than this machine's own, visitors cannot choose the model",
    )
    app.add_argument("--port", type=int, default=7860, help="port to listen on")
    app.add_argument("--browser", action="store_true", help="open the page in a browser")
    add_device(command)


def run(options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    model = models.load(options.model, device, dtype) if options.model else None
    app = interface.App(model, device, dtype, choose=options.host in LOCAL)
    interface.launch(app, options.host, options.port, options.browser)
