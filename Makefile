# demo: the toolkit on its built-in world · explore: look at it in the browser · test: everything · check: the quick part of it
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo explore test check lint
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/saeunlearn demo

explore: .venv/.installed
	@test -f runs/demo/report.json || $(BIN)/saeunlearn demo
	$(BIN)/saeunlearn explore

test: lint
	$(BIN)/pytest -q -n 2 --dist loadfile

check: lint
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" --ignore=tests/real

lint: .venv/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The stamp is written last, so that a failed installation is tried again; pip is there only if venv finished.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saeunlearn needs Python 3.11 or newer, but $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "creating .venv and installing into it (minutes, about 2 GB)"; \
	  $(PYTHON) -m venv .venv; }
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
