# demo: the toolkit on its built-in world · explore: look at it in the browser · test: everything · check: the quick part of it
# notebooks: execute those of analysis/ with their full settings and keep the outputs (about an hour on two cores)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo explore test check lint browser notebooks
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/saeunlearn demo

explore: .venv/.installed
	@test -f runs/demo/report.json || $(BIN)/saeunlearn demo
	$(BIN)/saeunlearn explore

test: lint browser
	$(BIN)/pytest -q -n 2 --dist loadfile

check: lint
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" --ignore=tests/real

notebooks: .venv/.installed
	$(BIN)/python analysis/build.py

lint: .venv/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The tests of the explorer's page need Chromium: what is there, else the system's package, else Playwright's own.
browser: .venv/.installed
	@command -v chromium chromium-browser >/dev/null || { \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
	  timeout 300 $(BIN)/playwright install chromium >/dev/null 2>&1 || \
	  echo "Chromium could not be installed: the tests of the explorer's page will be left out" >&2; }

# The stamp is written last, so that a failed installation is tried again; pip is there only if venv finished.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saeunlearn needs Python 3.11 or newer, but $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "creating .venv and installing into it (minutes, about 2 GB)"; \
	  $(PYTHON) -m venv .venv; }
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
