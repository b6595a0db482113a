# Every target sets up what it needs by itself; see `make help`.
VENV ?= .venv
PYTHON ?= python3
MODEL ?= smollm2-135m
ARGS ?=
ZOO_SOURCE ?= ../shared/zoo
ZOO ?= .zoo

# Tests that fill the machine by themselves; the others run two at a time.
MANY_PROCESSES := tests/e2e tests/parallel

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup starter demo serve test test-fast sweep lint format bench zoo

help: ## Show this list
	@echo "usage: make TARGET [VENV=.venv] [PYTHON=python3] [MODEL=smollm2-135m] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(INSTALLED) ## Make the virtual environment and install shardwright into it

$(INSTALLED): pyproject.toml constraints.txt scripts/setup
	@scripts/setup $(VENV) $(PYTHON)
	@touch $@

starter: $(INSTALLED) ## Fetch the starter model into the user's cache, once
	@$(BIN)/python -c "from shardwright.models.starter import starter_directory; print(starter_directory())"

demo: $(INSTALLED) ## Ask the starter model a question
	@$(BIN)/shardwright run $(MODEL) --chat --temperature 0 --max-tokens 128 $(ARGS) "Explain in two sentences why the sky is blue."
	@echo
	@echo "Next: 'make serve' starts an OpenAI-compatible server; '$(BIN)/shardwright chat' talks to it."

serve: $(INSTALLED) ## Serve a model over HTTP; e.g. make serve MODEL=path/to/model ARGS='--port 9000'
	@$(BIN)/shardwright serve $(MODEL) $(ARGS)

test: $(INSTALLED) starter ## Run all tests but the sweep
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not sweep" -n 2 --dist loadfile $(MANY_PROCESSES:%=--ignore=%) $(ARGS)
	@$(BIN)/python -m pytest -m "not sweep" $(MANY_PROCESSES) $(ARGS)

sweep: $(INSTALLED) ## Run what takes too long for every run: each architecture on ranks of each shape
	@$(BIN)/python -m pytest -m sweep $(ARGS)

test-fast: $(INSTALLED) ## Run the tests that take milliseconds
	@$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## Mend style and formatting where that can be done by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

zoo: $(INSTALLED) ## Serve every architecture that ZOO_SOURCE builds, and write docs/coverage.md
	@PYTHONDONTWRITEBYTECODE=1 $(BIN)/python $(ZOO_SOURCE)/zoo.py build $(ZOO)/models
	@PYTHONDONTWRITEBYTECODE=1 $(BIN)/python $(ZOO_SOURCE)/custom.py build $(ZOO)/custom
	@$(BIN)/python benchmarks/coverage.py $(ZOO)/models $(ZOO)/custom --output docs/coverage.md $(ARGS)

bench: $(INSTALLED) ## Measure a model on the standard workloads
	@$(BIN)/shardwright bench all $(MODEL) $(ARGS)
