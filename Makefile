# Two commands: `make demo` and `make test`. Each makes .venv, installs what it needs there, and runs.
# Another torch build: make clean test TORCH="torch==2.11.0"; another Python: make clean test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
OLDEST_TRITON := 3.6.0
SMP := 0.6.0
# What the tests use besides what is installed, each in a folder of its own.
BESIDE = .venv/triton-$(OLDEST_TRITON) .venv/smp-$(SMP) .venv/gradio

# What `make bench` measures: everything with ARGS=, a part with ARGS='-k "512x512 and inference-unet++-L4"'.
ARGS ?= --quick

# What a wheel takes from the installed torch.
TORCH_LIBRARIES := libtorch.so libtorch_cpu.so libc10.so

# The Triton that gpu-prepare and a dry run of gpu-check use, if it is not the installed one.
GPU_TRITON ?=
WITH_TRITON = $(if $(GPU_TRITON),PYTHONPATH=.venv/triton-$(GPU_TRITON))

.PHONY: demo test beside bench figures static docs coverage wheel wheel-cuda gpu-check gpu-prepare lint format clean

demo: .venv/demo
	$(BIN)/python -m unetpp_fast demo --out demo

test: .venv/test $(BESIDE)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

beside: $(BESIDE)

bench: .venv/bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

figures: .venv/bench
	$(BIN)/python benchmarks/figures.py

# The pages as HTML in build/docs; a warning, such as a link to nothing, is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

# Least times on a GPU, computed from the compiled kernels; needs nvcc and no GPU.
static: .venv/test
	$(BIN)/python benchmarks/static

# A wheel for every Python, and every torch >= 2.10, of a Linux as old as this one or newer: with the CPU kernels, or, for
# which nvcc is needed and no GPU, with the CUDA kernels too.
wheel: KERNELS = cpu
wheel-cuda: KERNELS = cuda
wheel wheel-cuda: .venv/release
	rm -rf build/wheel build/lib.*  # which may hold a library that this wheel is to be without
	UNETPP_FAST_BUILD=$(KERNELS) $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist $(TORCH_LIBRARIES:%=--exclude %) build/wheel/*.whl

# On a machine with a GPU; with the Python that has its torch: make gpu-check OUT=folder PYTHON=python3
# Without a GPU, with tiny inputs: make gpu-check OUT=folder ARGS=--dry-run
gpu-check gpu-prepare: ARGS =
gpu-check:
	$(WITH_TRITON) $(if $(wildcard .venv/base),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py --out "$(OUT)" $(ARGS)

# Before that, on any machine: compiles the kernels that gpu-check runs, into build/gpu-kernels, which is to be taken along.
# It has to be done by the Triton of the machine with the GPU: make gpu-prepare GPU_TRITON=3.6.0
gpu-prepare: .venv/test $(if $(GPU_TRITON),.venv/triton-$(GPU_TRITON))
	$(WITH_TRITON) $(BIN)/python benchmarks/gpu_prepare.py $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests, and what of the package none of them runs; see also build/coverage/index.html.
coverage: .venv/test $(BESIDE)
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover
	$(BIN)/python -m coverage html --quiet

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info demo

# What is installed is remembered as an empty file, made anew when setup.py changes.
.venv/demo .venv/test .venv/bench .venv/docs .venv/release: .venv/%: setup.py pyproject.toml | .venv/base
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

# Neither the pages nor the tools of a release need kernels here; those that are built stay.
.venv/docs .venv/release: export UNETPP_FAST_BUILD = none

.venv/base:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "$(TORCH)"
	touch $@

# Another Triton beside the newest, which pip picks: tests compile the kernels by the oldest supported one too.
.venv/triton-%: | .venv/base
	-$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

# What the page of `unetpp-fast app` needs; apart, because it wants an older Pillow.
.venv/gradio: | .venv/base
	-$(BIN)/python -m pip install --quiet --target $@ "gradio>=6"

# segmentation_models_pytorch and what it imports, which the tests compare with. Apart, because no
# torchvision fits every torch: its Python code is enough. The rest of what they import is in the extra test.
.venv/smp-%: | .venv/base
	-$(BIN)/python -m pip install --quiet --no-deps --target $@ segmentation-models-pytorch==$* timm==1.0.31 torchvision==0.29.1
