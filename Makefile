# make demo and make test are the two commands that a fresh machine needs: Python 3.10 or newer, pip, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
SETUP := $(VENV)/.setup-done
DEMO := build/demo
# Two test processes for the two cores of a small machine; tests/conftest.py gives each one thread.
JOBS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow gpu-test tune lint format constraints clean

help:
	@echo "make demo       quantize the embedded model to 4 bits, check it, and print the figures"
	@echo "make test       the tests            make test-slow  the slow ones       make gpu-test  those that need a GPU"
	@echo "make tune       configurations of the kernels for this GPU: make tune KINDS=int4_g128,nvfp4"
	@echo "make lint       ruff and mypy        make format     rewrite the style   make clean     remove what was built"
	@echo "make constraints  pin the newest versions of everything but torch in constraints.txt"

setup: $(SETUP)

# Runs again only when pyproject.toml or constraints.txt changed. torch goes first and alone: the largest download, and a
# build that is already chosen (a CPU wheel, say) then satisfies everything that follows.
$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.12 ..."; exit 4; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory venv
	$(PIP) install -c constraints.txt torch setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Debian leaves ensurepip out of python3: there the system's pip installs a pip into the empty environment.
.PHONY: venv
venv:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install -c constraints.txt pip; }

demo: $(SETUP)
	rm -rf $(DEMO)
	$(BIN)/quantkit quantize recipes/quickstart.yaml --out $(DEMO)
	@echo "The quantized checkpoint is in $(DEMO); what was measured is in $(DEMO)/quantkit.json."

test: $(SETUP)
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(SETUP)
	$(BIN)/python -m pytest -m "slow and not gpu"

gpu-test: $(SETUP)
	$(BIN)/python -m pytest -m gpu tests/gpu

# Writes kernels/quantkit_kernels/tables/NAME.json, and goes on where it was cut off; python kernels/tune.py --help.
KINDS ?= int4_g128
tune: $(SETUP)
	$(BIN)/python kernels/tune.py --kinds $(KINDS)

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One list for CPython 3.10 to 3.13, by environment markers. torch is held where we test it; what only its CUDA builds
# need is left to the torch that is installed. The comment at the head of the file is kept.
constraints: $(SETUP)
	$(PIP) install --quiet uv
	mkdir -p build
	echo "torch==2.13.0" >build/torch.txt
	echo pip | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-header --no-annotate \
	  --extra dev -c build/torch.txt pyproject.toml - -o build/pins.txt
	{ grep '^#' constraints.txt; grep -vE "^(nvidia-|cuda-)|== '(win32|emscripten)'" build/pins.txt; } >build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
