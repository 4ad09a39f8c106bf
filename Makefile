# `make demo` and `make test` are all a newcomer needs; both build the virtual environment first.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: demo test quality clean

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable ".[test]"
	@touch .venv

demo: .venv
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu recipes/demo.py --config recipes/configs/demo.yaml

test: .venv
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

quality: .venv
	$(BIN)/ruff check src recipes tests
	$(BIN)/ruff format --check src recipes tests
	$(BIN)/mypy

clean:
	rm -rf .venv build
