# `make demo` and `make test` are all a newcomer needs; both build the virtual environment first. For the other targets
# see .github/CONTRIBUTING.md.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PYTEST := -m pytest --numprocesses 2 --dist loadfile
PACKAGES := $(subst /,.,$(patsubst src/%/__init__.py,%,$(wildcard src/*/__init__.py src/*/*/__init__.py)))
ONE_PROCESS := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test test-floor test-gpu benchmark-gpu quality docs clean

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable ".[test]"
	@touch .venv

demo: .venv
	$(BIN)/accelerate launch --quiet $(ONE_PROCESS) --cpu recipes/demo.py --config recipes/configs/demo.yaml

test: .venv
	$(OFFLINE) $(BIN)/python $(PYTEST)

# the suite on the lowest version of each dependency that pyproject.toml admits, in an environment of its own
build/floor: pyproject.toml
	$(PYTHON) -m venv build/floor
	grep -ohE '"[A-Za-z0-9_.-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u > build/floor/constraints.txt
	build/floor/bin/python -m pip install --quiet --upgrade pip
	build/floor/bin/python -m pip install --quiet --constraint build/floor/constraints.txt --editable ".[test]"
	@touch build/floor

test-floor: build/floor
	$(OFFLINE) build/floor/bin/python $(PYTEST)

# needs an accelerator, and an environment built with `make CONSTRAINTS= .venv`
test-gpu: .venv
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

benchmark-gpu: .venv
	$(BIN)/accelerate launch --quiet $(ONE_PROCESS) recipes/benchmark.py --output_dir recipes/results/benchmark-gpu
	$(BIN)/accelerate launch --quiet $(ONE_PROCESS) recipes/memory.py --output_dir recipes/results/benchmark-gpu

quality: .venv
	$(BIN)/ruff check src recipes tests
	$(BIN)/ruff format --check src recipes tests
	$(BIN)/mypy

# the ignored warning is about annotations of PEFT, which pdoc cannot evaluate
docs: .venv
	$(BIN)/python -m pytest --quiet tests/test_docs.py
	$(BIN)/python -W error::UserWarning -W "ignore:Error parsing type annotation Optional:UserWarning" \
		-m pdoc --docformat google --output-directory build/docs $(PACKAGES)
	@echo "wrote build/docs/index.html"

clean:
	rm -rf .venv build
