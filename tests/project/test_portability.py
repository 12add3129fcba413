"""What works on Linux alone without anybody there noticing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("unetpp_fast", "kernels", "examples", "csrc", "docs")
READS_TEXT = {"open", "fdopen", "read_text", "write_text"}
NO_FILES = {"Image", "app", "self", 'need("PIL.Image", "commands")'}  # whose `open` is another


def text_without_encoding(source: str) -> list[int]:
    """The lines of calls that read or write text as the system's language has it, on Windows not UTF-8."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = ast.unparse(call.func.value).replace("'", '"') if isinstance(call.func, ast.Attribute) else ""
        words = [part.value for part in call.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        binary = name in ("open", "fdopen") and any("b" in word for word in words if set(word) <= set("rwaxb+"))
        given = {keyword.arg for keyword in call.keywords}
        text = (name in READS_TEXT and owner not in NO_FILES) or given & {"text", "universal_newlines"}
        if text and not binary and "encoding" not in given and not (name == "read_text" and words):
            lines.append(call.lineno)
    return lines


def test_text_is_read_and_written_as_utf_8():
    files = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): text_without_encoding(path.read_text("utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert text_without_encoding("open(a)\npath.read_text()\nos.fdopen(h, 'w')\nrun(c, text=True)") == [1, 2, 3, 4]
    assert text_without_encoding("open(a, 'rb')\nopen(a, encoding='utf-8')\npath.read_text('utf-8')") == []


MISSING = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "fcntl", "resource", "pwd", "termios"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
for name in ("triton", "fcntl", "resource", "pwd", "termios"):
    sys.modules.pop(name, None)
from types import SimpleNamespace
from unetpp_fast.common import atomic_files
atomic_files.WINDOWS = True
sys.modules["msvcrt"] = SimpleNamespace(locking=lambda *_: None, LK_LOCK=1)
"""
USE = """
import torch
import unetpp_fast as uf
from unetpp_fast.cli import main
model, x = uf.UNetPlusPlus(1, 1, features=(4, 8)).eval(), torch.rand(1, 1, 4, 6)
with torch.no_grad():
    assert model(x).shape == (1, 1, 4, 6)
print(uf.explain(model, x))
assert main(["info"]) == 0
print("\\u65e5")  # in the name of a file
"""


def test_without_what_other_systems_lack(tmp_path: Path):
    """Windows has no Triton and no modules for POSIX, and a code page; macOS has no Triton."""
    environment = {"UNETPP_FAST_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", MISSING + USE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
