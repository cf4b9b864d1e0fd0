# make demo   set up and audit a clamp on a real model
# make test   set up and run every check that CI runs
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(VENV)/bin/undertow run ioi

test: $(VENV)/installed-dev lint
	$(VENV)/bin/pytest

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/suffix_pass.py

# torch goes first and alone: other packages' open ranges would pull another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# The libraries that write other SAE formats, for the tests that read them; dictionary-learning's own dependencies are for training.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev,formats]'
	$(PIP) --no-deps dictionary-learning
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
