# Two commands for people: `make serve` and `make test`. Both need only python3 >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test install

serve: .venv/serve.stamp
	@echo "==> Serving the bundled demo model (ARGS=\"...\" adds flags; Ctrl-C stops)"
	@$(BIN)/fastserve serve $(ARGS)

test: .venv/test.stamp
	@echo "==> Testing"
	@scripts/test

install: .venv/serve.stamp

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastserve needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@echo "==> Creating a virtual environment in .venv"
	@$(PYTHON) -m venv .venv

.venv/serve.stamp: .venv/bin/python pyproject.toml constraints.txt
	@echo "==> Installing FastServe into .venv (once; torch is the largest part)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/test.stamp: .venv/serve.stamp
	@echo "==> Installing the test tools into .venv (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
