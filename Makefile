# Each goal sets up everything it needs in .venv, and the second time that costs nothing.
#
#   make test TORCH='torch==2.11.0'      with another torch
#   make demo PYTHON=python3.12          with another Python, 3.10 to 3.13
#   make test ARGS='-k capture -x'       arguments for what the goal runs

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
WORKERS ?= 2
ARGS    ?=

VENV := .venv
RUN  := $(VENV)/bin/python
PIP  := $(RUN) -m pip --disable-pip-version-check -q

# Another pyproject.toml, torch, Python or place on the disk: another stamp, so setup runs again.
KEY   := $(shell { cat pyproject.toml; echo '$(TORCH) $(PYTHON) $(CURDIR)'; } | cksum | tr ' ' '-')
STAMP := $(VENV)/.ready-$(KEY)

VERSION := import sys; print(*sys.version_info[:2], sep=".")

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bars clean setup

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Quantize and compile the shipped model, and compare it with float
	@echo "demo: score, plan, quantize and compile the shipped model, then compare it with float"
	@$(VENV)/bin/mixllm demo $(ARGS)

test: lint ## Everything that CI checks: lint, types and all tests
	@echo "test: pytest, $(WORKERS) workers"
	@$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and strict mypy
	@echo "lint: ruff, rules"
	@$(RUN) -m ruff check -q .
	@echo "lint: ruff, format"
	@$(RUN) -m ruff format -q --check .
	@echo "lint: mypy, strict"
	@$(RUN) -m mypy

format: $(STAMP) ## Let ruff mend what it can
	@$(RUN) -m ruff check -q --fix .
	@$(RUN) -m ruff format .

bars: $(STAMP) ## Print every measured bar of bench/results as one table
	@$(RUN) bench/bars.py $(ARGS)

setup: $(STAMP) ## Only set up .venv
	@echo "setup: $(VENV) is ready"

clean: ## Remove .venv, caches and builds
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find mixllm_compiler tests bench -name __pycache__ -prune -exec rm -rf {} +

$(STAMP):
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else f"setup: mixllm-compiler needs Python 3.10 to 3.13, and $(PYTHON) is {sys.version.split()[0]}. Choose one: make PYTHON=python3.12 …")'
	@echo "setup: a virtual environment in $(VENV)"
	@$(RUN) -m pip --version >/dev/null 2>&1 \
	  && [ "$$($(RUN) -c '$(VERSION)')" = "$$($(PYTHON) -c '$(VERSION)')" ] \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo "setup: $(TORCH), before all that would bring a torch of its own (minutes, once)"
	@$(PIP) install '$(TORCH)'
	@echo "setup: mixllm-compiler with its development tools"
	@$(PIP) install -e '.[dev]' '$(TORCH)'
	@rm -f $(VENV)/.ready-*
	@touch $@
