# Four verbs: demo, test, check, bench. Each makes the environment it needs; the second call finds it ready.
#   make demo PYTHON=python3.13    another interpreter
#   make test ARGS="-k topology"   arguments for pytest; ARGS="-m slow" runs the slow ones; ARGS="-n 0" all in one process
#   make test EXTRAS=dev,torch     with PyTorch too, and the tests that need it

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS ?= dev
comma := ,
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))

# One BLAS thread: peers are the parallelism, and sums come out the same every time.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: demo test check bench
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/dlion demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 2 $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@set -e; for script in scripts/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dlion needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.13" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[$(EXTRAS)]'
	@touch $(READY)
