# make demo    set everything up in .venv and watch the embedded model answer
# make test    the same environment; formatting, types and all tests
#
# PYTHON=python3.12            another interpreter (3.11 or newer)
# TORCH_ARGS="--index-url ..." further arguments for installing torch, for instance PyTorch's index of CPU-only wheels
#                              (see pytorch.org): pip's default for Linux may be the build for CUDA, which works as well
#                              but is larger

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
BENCH_FOLDER ?= build/bench
COVERAGE_ARGS ?= --backends cpu torch xnnpack --report docs/coverage.md

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOTS := builder runtime bundles tests

.PHONY: demo test lint bench coverage clean

demo: $(STAMP)
	@$(BIN)/genbundle demo $(DEMO_ARGS)

test: lint
	$(BIN)/pytest --durations=15 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(ROOTS)
	$(BIN)/ruff format --check $(ROOTS)
	$(BIN)/pyright --pythonpath $(BIN)/python

# The budgets, then the same shape beside llama.cpp and ONNX Runtime GenAI (compiled and installed into an environment of
# their own, ten minutes the first time), the products by weights alone, memory. About an hour.
bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.budgets --keep $(BENCH_FOLDER) $(BENCH_ARGS)
	$(BIN)/python -m tests.benchmarks.peers $(BENCH_FOLDER) --long --plot $(BENCH_FOLDER)/benchmarks.svg
	$(BIN)/python -m tests.benchmarks.products $(BENCH_FOLDER)/cpu-4096.bundle
	$(BIN)/python -m tests.benchmarks.products $(BENCH_FOLDER)/cpu-4096.bundle --tokens 128
	$(BIN)/python -m tests.benchmarks.memory $(BENCH_FOLDER)

coverage: $(STAMP)
	$(BIN)/python -m tests.zoo.coverage $(COVERAGE_ARGS)

# Remade when pyproject.toml changes; pip then installs what differs.
$(STAMP): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'genbundle needs Python 3.11 or newer: make PYTHON=...')"
	@echo "Installing into $(VENV): torch, transformers and the engines; a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "$$(sed -n 's/^torch = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@$(BIN)/python -m pip install --quiet -e ".[builder,test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find $(ROOTS) -name __pycache__ -type d -exec rm -rf {} +
