# Two commands for people: `make serve` and `make test`. Both need only python3 >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help serve test test-all coverage install

help:
	@echo "make serve     install into .venv and serve a model over the OpenAI API (ARGS=\"MODEL --flag …\")"
	@echo "make test      install the test tools too and run the tests"
	@echo "make test-all  the slow tests too, those against lm-eval among them"
	@echo "make coverage  the tests of make test, and the branch coverage of some rooms by them"
	@echo "make install   only install"

serve: install
	@echo "==> fastserve serve $(ARGS)   (no model named: the bundled demo; Ctrl-C stops)"
	@exec $(BIN)/fastserve serve $(ARGS)

test: .venv/test.stamp
	@echo "==> Testing"
	@scripts/test

test-all: .venv/eval.stamp
	@echo "==> Testing, the slow tests too"
	@scripts/test --all

coverage: .venv/test.stamp
	@echo "==> Testing, with coverage"
	@scripts/coverage

install: .venv/serve.stamp

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastserve needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@echo "==> Creating a virtual environment in .venv"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/serve.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "==> Installing FastServe into .venv (once; torch is the largest part)"
	@$(PIP) -e .
	@touch $@

.venv/test.stamp: .venv/serve.stamp
	@echo "==> Installing the test tools into .venv (once)"
	@$(PIP) -e '.[dev]'
	@touch $@

.venv/eval.stamp: .venv/test.stamp
	@echo "==> Installing lm-eval into .venv (once)"
	@$(PIP) -e '.[dev,eval]'
	@touch $@
