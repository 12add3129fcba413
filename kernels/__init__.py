"""The GPU kernels of unetpp_fast, installed as `unetpp_fast.kernels`.

With the repository's root on the path, a bare `import kernels` would load a second copy under another name (and
hide Hugging Face's package of that name); it is refused.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package unetpp_fast.kernels: install with `pip install -e .` and import it by that name"
    )
