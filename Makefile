# make demo | test | check: each sets up .venv first. See README.md.
PYTHON ?= python3
BIN := .venv/bin
# Without bytecode files, every process would compile hundreds of files again.
unexport PYTHONDONTWRITEBYTECODE
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_WAIT_POLICY=passive

.PHONY: help demo test check parity bench golden format clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (one to two minutes)…"
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[demo,dev]'
	touch .venv/ready

demo: .venv/ready  ## train the bundled demo; prints where audio and plots are
	$(OFFLINE) $(BIN)/python -m magnet_train fit

test: .venv/ready  ## run the whole test suite, offline
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready  ## check format, lint and types, and run the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

parity: .venv/ready  ## rewrite the table of differences from audiocraft
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_reference*.py tests/test_convert.py \
		--parity-table benchmarks/records/reference_parity.md

bench: .venv/ready  ## measure time and memory of this project and the reference implementations on this CPU
	$(OFFLINE) $(BIN)/python -m magnet_train bench --json benchmarks/records/cpu.json

golden: .venv/ready  ## regenerate tests/golden; say in the commit why the numbers changed
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/test_golden.py

format: .venv/ready  ## format the code and fix lint as `make check` expects
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, builds and caches
	rm -rf .venv build dist .pytest_cache .ruff_cache
