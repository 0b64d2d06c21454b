# SPDX-License-Identifier: Apache-2.0
# Everything a newcomer runs. The environment is made once and renewed when its pins change.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
TORCH_INDEX ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-gpu headline-check bench-train bench-attack bench-deploy lint

help: ## this list
	@awk -F ' *## *' '/^[a-z-]+:.*## /{sub(/:.*/, "", $$1); printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  settings, as in 'make test VENV=/elsewhere':"
	@printf '    %-16s %s\n' \
	  'VENV=$(VENV)' 'the environment to make or use' \
	  'PYTHON=$(PYTHON)' 'the interpreter (3.11 or later) that makes it' \
	  'WORKERS=$(WORKERS)' 'test processes' \
	  'TORCH_INDEX=$(TORCH_INDEX)' 'index that $(TORCH) comes from; when empty pip decides, and on' \
	  '' 'Linux that is the CUDA build: pytorch.org names an index for each build'

env: $(STAMP) ## the environment alone, from requirements.lock

$(STAMP): requirements.lock pyproject.toml setup.py $(wildcard harprune/kernels/native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "harprune needs Python 3.11 or later; name one with: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## pretrain, prune, finetune, attack and report on 8x8 digits, on one CPU
	$(BIN)/harprune run recipes/digits.toml --out runs/digits

test: $(STAMP) ## the tests that take minutes in all
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu"

test-slow: $(STAMP) ## the tests that take minutes each
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(STAMP) ## the tests that need an accelerator
	$(PYTEST) -m gpu

bench-train: $(STAMP) ## one training step against a literal implementation, to results/train_step.json
	$(BIN)/python bench/train_step.py --json results/train_step.json

bench-attack: $(STAMP) ## attacks on pruned networks against torch, to results/attack.json
	$(BIN)/python bench/attack.py --json results/attack.json

bench-deploy: $(STAMP) ## deployed networks against other runtimes, to results/deploy.json
	$(BIN)/python bench/deploy.py --json results/deploy.json --plot results/deploy.svg

headline-check: $(STAMP) ## the committed ResNet-18 of 1 %, on CIFAR-10 again (harprune data cifar10)
	HARPRUNE=$(BIN)/harprune bench/headline_check.sh

lint: $(STAMP) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v node >/dev/null; then $(BIN)/pyright --pythonpath $(BIN)/python; \
	  else echo "types not checked: pyright needs node on the PATH"; fi
