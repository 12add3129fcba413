"""`unetpp-fast app` in a browser: the sample, another image, a broken file, levels and modes, several models; nothing from
elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.web import GRADIO, browser, free_port, wait_for

import unetpp_fast as uf
from unetpp_fast.training.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, seed: int = 0) -> Path:
    """The folder of a training, with weights as they were drawn."""
    torch.manual_seed(seed)
    network = uf.UNetPlusPlus(1, 2, features=(4, 8, 8), deep_supervision=True)
    content = {"config": network.config, "model": network.state_dict(), "about": {"classes": ["cells", "<b>rims"]}}
    save_checkpoint(folder / "best.pt", content)
    return folder


@contextlib.contextmanager
def serving(folder: Path, *models: Path) -> Iterator[str]:
    """The address of the page of models; its log is in the folder."""
    if not (GRADIO / "gradio").is_dir():
        pytest.skip(f"gradio is not installed: pip install --target {GRADIO.relative_to(ROOT)} gradio")
    port = free_port()
    command = [sys.executable, "-m", "unetpp_fast", "app", "--port", str(port), "--device", "cpu", "--model", *models]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{GRADIO}", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        log = folder / "log"
        wait_for(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, "the page")
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/"
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def served(tmp_path):
    """The address of the page of a small model."""
    with serving(tmp_path, write_run(tmp_path / "run")) as address:
        yield address


def test_an_image_goes_in_and_its_mask_comes_out(served, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 52, 3), np.uint8)).save(tmp_path / "colour.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "colour.png").read_bytes()[:900])
    with browser(tmp_path / "profile") as page:
        page.open(served)
        wait_for(lambda: "Drop an image" in page.text("#status"), "the page")
        assert "heads at L1, L2" in page.text("body") and "cells, <b>rims" in page.text("body")
        page.click("#sample")
        wait_for(lambda: page.text("#status").startswith("image.png, 512 x 512: cells"), "the sample's mask")
        wait_for(lambda: page.text("#times").count(" ms") == 4, "the times of two levels in two modes")
        sources = "return ['overlay', 'mask'].map(id => document.querySelector(`#${id} img`).src)"
        before = page.run(sources)
        assert all(source.startswith(served) for source in before)
        page.click("#mode input[value=fast]")
        wait_for(lambda: page.run(sources)[0] != before[0], "the picture of the fast mode")
        chosen = wait_for(lambda: page.text("#times td.chosen"), "the chosen time")
        assert re.search(r"L2 [\d,]+ " + re.escape(chosen), page.text("#times"))

        remove = "#file button[aria-label='Clear'], #file button[aria-label='Remove this file']"
        for name, says in (
            ("broken.png", "broken.png cannot be read as an image"),
            ("colour.png", "channels averaged: cells"),
        ):
            page.click(remove)
            wait_for(lambda: "Drop an image" in page.text("#status"), "the empty page")
            page.type("#file input[type=file]", str(tmp_path / name))
            wait_for(lambda says=says: says in page.text("#status"), says)
            assert page.run("return document.querySelectorAll('#mask img').length") == (name == "colour.png")
        assert "colour.png, 40 x 52" in page.text("#status")
        asked = page.requested()
        assert asked and all(address.startswith(served) for address in asked)
    with urllib.request.urlopen(served) as answer:  # nothing else may be loaded, whatever gradio asks for
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")


def test_the_folds_of_a_cross_validation_predict_together(tmp_path):
    for number in range(2):
        write_run(tmp_path / f"cv/fold{number}", number)
    with serving(tmp_path, tmp_path / "cv") as address, browser(tmp_path / "profile") as page:
        page.open(address)
        wait_for(lambda: "cv, the mean of 2 networks (fold0, fold1)" in page.text("body"), "the model")
        page.click("#sample")
        wait_for(lambda: page.text("#times").count(" ms") == 4 + 3, "the times of all levels and of the members")
        assert re.search(r"fold0 [\d.]+ ms fold1 [\d.]+ ms in sum [\d.]+ ms$", page.text("#times"))
        sources = "return ['overlay', 'mask'].map(id => document.querySelector(`#${id} img`).src)"
        before = page.run(sources)
        page.click("#view input[value=disagreement]")
        wait_for(lambda: page.run(sources)[0] != before[0], "the picture of where they disagree")
        assert "where the members' probabilities lie 0." in page.text("#status")
        page.click("#mode input[value=fast]")
        wait_for(lambda: "MEMBER L2, FAST" in page.text("#times").upper(), "the times of the fast mode")
        page.click("#view input[value=masks]")
        wait_for(lambda: "of the pixels" in page.text("#status"), "the masks")
