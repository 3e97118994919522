# Set-up and everyday commands; `make demo` and `make test` need nothing but Python 3.11 or 3.12 and make.
# JOBS: processes of `make test`, about 3 GB each.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if v in {(3, 11), (3, 12)} else f'fp4flash needs Python 3.11 or 3.12, this is {v}; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m qat.train +experiment=mimo_fp4

test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest tests -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright core

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
