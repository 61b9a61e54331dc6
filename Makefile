# SPDX-License-Identifier: MIT
# make run     set up, then probe (a guest where this machine has no msr driver); the record goes to results/
# make test    set up, then every tier that this machine can hold
# make check   format, lint, types
# make bench   the speed figures, as ratios in one run
# make docs    the manual page and the shells' completions in share/, from the parser

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: run test check bench docs clean

run: $(READY)
	@$(VENV)/bin/spec-ctrl-probe run $(ARGS) || test $$? -eq 1

test: $(READY)
	@tests/install-packages test
	@tests/run-tiers $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(READY)
	@tests/install-packages test
	@$(PYTHON) -m tests.bench $(ARGS)

docs: $(READY)
	@$(PYTHON) -m tests.share

$(READY): pyproject.toml tests/install-packages
	@tests/install-packages
	@echo "setting up the Python environment in $(VENV)"
	@python3 -m venv $(VENV)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --editable '.[guest,explore,report,lab,recipes,test,check,browser]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache build *.egg-info
