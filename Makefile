# Every target sets itself up: a virtual environment in .venv, made once and reused.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench/history/gpu
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT := Explain in three sentences how a rainbow forms.

.PHONY: help demo test test-full test-triton-lowest lint bench-plain gpu clean

help:
	@echo "make demo         chat with SmolLM2, decoding speculatively"
	@echo "make test         lint, types and every test but the slow ones (under 15 minutes)"
	@echo "make test-full    every test; the result goes to bench/history/test-full.json"
	@echo "make test-triton-lowest  every compiled kernel, by the oldest Triton that is supported"
	@echo "make lint         ruff and mypy"
	@echo "make bench-plain  plain decoding against transformers' greedy generate"
	@echo "make gpu          everything that needs a GPU; OUT=DIR says where results go, PART=NAME"
	@echo "                  takes one part, QUICK=1 less of everything"
	@echo "make clean        remove the virtual environment, builds and caches"

demo: $(STAMP)
	@$(BIN)/speckv generate --chat --max-new-tokens 96 "$(PROMPT)"

# Kernels run in Triton's interpreter or compile ahead of time, never both in one process: the
# choice is made when a kernel is first imported. Hence two runs of pytest, each of WORKERS
# processes with one thread: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
# The oldest Triton lies beside the newest, which its folder hides. Its compiler takes other code,
# and makes other code of it: kernels for one architecture are compiled in `make test`.
LOWEST := $(VENV)/triton-lowest
PYTEST_LOWEST := env -u TRITON_INTERPRET OMP_NUM_THREADS=1 PYTHONPATH=$(LOWEST) \
  $(BIN)/python -m pytest -n $(WORKERS) --dist load
test: lint $(LOWEST)/.installed
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow"
	env -u TRITON_INTERPRET $(PYTEST) -m "not interpreter and not slow"
	$(PYTEST_LOWEST) -k sm_90 $(addprefix tests/aot/test_,compile.py baseline.py system_stores.py)

test-triton-lowest: $(LOWEST)/.installed
	$(PYTEST_LOWEST) tests/aot

test-full: $(STAMP) $(LOWEST)/.installed
	$(BIN)/python tests/report.py --workers $(WORKERS) --out bench/history/test-full.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-plain: $(STAMP)
	$(BIN)/python -m bench.plain

# A part at a time where a command has ten minutes: make gpu PART=kernels, PART=loop and so on.
gpu: $(STAMP)
	$(BIN)/python -m bench.gpu --out $(OUT) $(if $(PART),--part $(PART)) $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(LOWEST)/.installed: $(STAMP)
	@lowest=$$(sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml); \
	  echo "Fetching Triton $$lowest (once)"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
	    --target $(LOWEST) "triton==$$lowest"
	@touch $@

# pip's log is cut down to one line a package; its errors reach the terminal untouched.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  v >= (3, 10) or sys.exit(f"error: speckv needs Python 3.10 or newer, found {v[0]}.{v[1]}")'
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev,train]' \
	  | sed -un -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected.*/  installing/p'
	@touch $@
