# Every target sets up what it needs, on a fresh machine too.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Apart and without what it asks for: torchvision as PyPI has it wants CUDA's torch, and beside a CPU one it breaks transformers.
VISION = $(PIP) --no-deps --upgrade --target .venv/vision timm torchvision

.PHONY: demo test check bench fuzz clean

demo: .venv/nursery
	$(BIN)/eigenzoo demo --force

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile

check: .venv/check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_project.py

bench: .venv/bench
	$(BIN)/python -m bench

SECONDS ?= 60
fuzz: .venv/fuzz
	$(BIN)/python -m fuzz --seconds $(SECONDS)

clean:
	rm -rf .venv .fuzz

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("eigenzoo needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/nursery: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[nursery,report]'
	touch $@

.venv/bench: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[bench]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	$(VISION)
	touch $@

.venv/check: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test,check]'
	touch $@

.venv/fuzz: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[fuzz]'
	touch $@
