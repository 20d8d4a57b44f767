# Two commands do everything: `make demo` and `make test`. The first run of either builds .venv.
PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.ready
GPTQMODEL := .engines/gptqmodel/.ready

.PHONY: demo test test-all check bench clean

demo: $(ENV) $(GPTQMODEL)  ## quantize the bundled model, export, verify, print the result
	$(BIN)/python scripts/demo.py

test: check  ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: check $(GPTQMODEL)  ## the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(ENV)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(ENV) $(GPTQMODEL)  ## the demo again, its figures kept in bench/results
	$(BIN)/python scripts/demo.py --keep bench/results

$(ENV): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[auto-round,audio,gguf,dev]"
	touch $@

$(GPTQMODEL): scripts/engines.sh $(ENV)
	bash scripts/engines.sh gptqmodel
	touch $@

clean:
	rm -rf .venv .engines .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
