"""Sphinx's settings: `make docs` writes build/docs/index.html, and fails on a warning."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project, author = "unetpp_fast", "The unetpp_fast developers"
copyright = author
release = re.search(r'__version__ = "(.+?)"', (ROOT / "unetpp_fast/common/version.py").read_text("utf-8"))[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
exclude_patterns = ["README.md"]
suppress_warnings = ["misc.highlighting_failure", "myst.header"]  # "…" in commands; headings of generated pages

# Docstrings: `name` is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 90

highlight_language = "none"  # what a program prints

html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_title = f"unetpp_fast {release}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# What a page of docs/ links to outside of it, as GitHub shows it, and the page that includes it here.
OUTSIDE = {"(../csrc/README.md": "(csrc.md", "(../CONTRIBUTING.md": "(contributing.md", "(../CHANGELOG.md": "(changelog.md"}


def inside(app, name: str, content: list[str]) -> None:
    for outside, page in OUTSIDE.items():
        content[0] = content[0].replace(outside, page)


def setup(app) -> None:
    app.connect("source-read", inside)
