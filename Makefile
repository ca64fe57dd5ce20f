# make demo    prune, fine-tune, export and verify a small trained model, and say what happened;
#              TASK=detection, segmentation, language_model or translation
# make test    all tests
# make check   ruff, its formatter, mypy --strict
# make docs    write the README's command reference anew from --help, and record its picture
# make clean   remove what these made
#
# Each makes .venv and installs what it needs, once. PYTHON and TORCH choose with what; on Linux, PyPI's torch brings CUDA
# along (about 3 GB): where a CPU-only wheel is at hand, name it, as in `make test TORCH=./torch-2.13.0+cpu-….whl`.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Test workers. Each uses one thread, so one a core; `make test WORKERS=0` runs in one process.
WORKERS ?= auto
TASK    ?= classification

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE    := $(wildcard CMakeLists.txt nmconvert/runtime/native/*)

.PHONY: demo test check docs clean

demo: $(INSTALLED)
	$(BIN)/python -m sample_models.demo $(TASK)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m docs.reference
	$(BIN)/python -m docs.record

$(INSTALLED): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("nmconvert needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
