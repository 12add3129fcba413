"""A headless browser, driven by WebDriver's protocol, and where gradio is installed for the tests of the page."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

GRADIO = Path(__file__).parents[2] / ".venv" / "gradio"  # `make test` puts it there, apart: it needs another Pillow
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,860",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for one
LONG = 60.0  # seconds; a page answers within a few on a quiet machine


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def wait_for(check: Callable[[], Any], what: str) -> Any:
    """What `check()` returns once it is true; errors on the way do not count."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        with contextlib.suppress(OSError, KeyError, IndexError, RuntimeError):
            if found := check():
                return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come in {LONG:.0f} s")


class Browser:
    """A page in Chromium."""

    def __init__(self, driver: str, profile: Path):
        self.driver = driver
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, method: str, path: str, content: dict | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=LONG) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.loads(error.read())["value"]["message"]) from error

    def call(self, method: str, path: str, content: dict | None = None) -> Any:
        return self._call(method, f"/session/{self.session}{path}", content)

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        """What an element shows, with single spaces."""
        return " ".join(self.run(f"return document.querySelector({json.dumps(selector)}).innerText").split())

    def requested(self) -> list[str]:
        """The addresses that the page asked for."""
        log = [json.loads(entry["message"])["message"] for entry in self.call("POST", "/se/log", {"type": "performance"})]
        sent = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:", "chrome"))]

    def picture(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("GET", "/screenshot"))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile; a skip where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("there is no browser: apt-get install chromium chromium-driver")
    port = free_port()
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: urllib.request.urlopen(f"{address}/status", timeout=5), "chromedriver")
            page = Browser(address, folder)
            try:
                yield page
            finally:
                page.call("DELETE", "")
        finally:
            process.terminate()
