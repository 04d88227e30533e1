# make demo | test | check: each sets up .venv first. See README.md.
PYTHON ?= python3
BIN := .venv/bin
# Bytecode is written at install; where this is set, every process would compile hundreds of files anew.
unexport PYTHONDONTWRITEBYTECODE
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline

.PHONY: help demo test check parity bench golden format clean
help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (one to two minutes)…"
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[demo,dev]'
	touch .venv/ready

demo: .venv/ready  ## train the embedded demo and hear it (9 minutes on 2 cores)
	$(OFFLINE) $(BIN)/python -m magnet_train fit

test: .venv/ready  ## the whole test suite, offline
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/ready  ## format, lint, types, quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

parity: .venv/ready  ## redraw the table of differences to the reference
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_reference*.py tests/test_convert.py \
		--parity-table benchmarks/records/reference_parity.md

bench: .venv/ready  ## time and memory on this CPU, beside the slow twins (10 minutes)
	$(OFFLINE) $(BIN)/python -m magnet_train bench --json benchmarks/records/cpu.json

golden: .venv/ready  ## renew tests/golden; say in the commit why the numbers changed
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/test_golden.py

format: .venv/ready  ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what can be made again
	rm -rf .venv build dist .pytest_cache .ruff_cache
