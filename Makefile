# Each target makes its own environment in .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
TOOLS := .venv/tools/bin
TESTS := $(BIN)/python -m pytest -n 2

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# LOCKED=1 installs what requirements.lock pins, each file checked against its digest; into an
# environment that is there already too.
LOCKED ?=
RUN := $(if $(LOCKED),.venv/locked.stamp,.venv/run.stamp)

.PHONY: quickstart test test-full faults coverage mutants lint format lock audit wheel pythons release-check

quickstart: $(RUN)
	$(BIN)/python main.py --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/dev.stamp
	$(TESTS) -m "not slow"

test-full: .venv/dev.stamp
	$(TESTS)

faults: .venv/dev.stamp
	$(BIN)/python tests/faults.py

# The share of the package's branches that the tests take.
coverage: .venv/dev.stamp
	mkdir -p .coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run --data-file=$(CURDIR)/.coverage/data -m pytest -n 2 -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

mutants: .venv/dev.stamp
	$(BIN)/python tests/mutants.py

# Installed from its wheel, outside of the repository.
wheel: | .venv/bin/python
	rm -rf .venv/wheel build && $(PYTHON) -m venv .venv/wheel
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .venv/wheel/dist .
	.venv/wheel/bin/python -m pip install --quiet --disable-pip-version-check .venv/wheel/dist/*.whl
	cd .venv/wheel && bin/proteus --version && bin/proteus evaluate --help >/dev/null && \
		bin/proteus plan --config=vitti14 --topology=v5e:4x4 | grep -q "MFU at most"

# The cheap tests under the other Pythons that are here, each in an environment of its own.
pythons:
	for version in 3.12 3.13; do \
		python$$version --version 2>/dev/null || { echo "no python$$version here"; continue; }; \
		python$$version -m venv .venv/py$$version && \
		.venv/py$$version/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt && \
		.venv/py$$version/bin/python -m pytest -n 2 -m "not slow" tests/models tests/data tests/methods \
			tests/checkpoint tests/test_config.py tests/weights/test_convert.py || exit 1; \
	done

# All that is too long for every change; the budget is two hours on two cores.
release-check: .venv/parity.stamp .venv/tpu.stamp lint test-full faults mutants wheel pythons
	.venv/tpu/bin/python tests/compile_for_tpu.py
	tests/clean_machine.sh
	tests/clean_machine.sh --image

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Both need the network; their tools stay out of .venv.
lock: .venv/tools.stamp
	$(TOOLS)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		requirements.txt --output-file requirements.lock

audit: .venv/tools.stamp
	$(TOOLS)/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

.venv/tools.stamp: | .venv/bin/python
	$(PYTHON) -m venv $(dir $(TOOLS))
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, found " + sys.version'
	$(PYTHON) -m venv .venv

.venv/run.stamp: requirements.txt pyproject.toml | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/locked.stamp: requirements.lock | .venv/bin/python
	$(PIP) --require-hashes -r requirements.lock
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(PIP) -r requirements-dev.txt
	touch $@

# What compiles for TPUs, on any machine; beside a CPU it would slow every start of JAX.
.venv/tpu.stamp: requirements.txt | .venv/bin/python
	$(PYTHON) -m venv .venv/tpu
	.venv/tpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "jax[tpu]==0.10.2"
	touch $@

.venv/parity.stamp: requirements-parity.txt .venv/dev.stamp
	$(PIP) -r requirements-parity.txt
	touch $@
