# Needs Python 3.11 or later with venv, and make; the rest is installed into .venv.
PYTHON ?= python3
# How many tests run side by side; most of them wait for other processes.
JOBS ?= 3
BIN := .venv/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo agent test test-all test-containers chaos soak lint bench clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 17

demo: .venv/.demo ## One MCP session on two workers, and a call that outlives its worker
	@$(BIN)/python -m examples.demo

agent: .venv/.agent ## Two agents on two workers, in one MCP session; with a real model where OPENAI_API_KEY is set
	@$(BIN)/python -m examples.agent

test: .venv/.test ## Run the tests; `make test ARGS="-k retry"` passes arguments on
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: .venv/.nox ## On each Python that is installed, with the newest and the oldest dependencies; `ARGS="-s oldest -- -k retry"`
	@JOBS=$(JOBS) $(BIN)/nox $(ARGS)

test-containers: .venv/.test ## Run the tests on separate hosts, in containers; skipped where no Docker engine answers
	@$(BIN)/python -m pytest tests/containers $(ARGS)

chaos: .venv/.test ## Kill workers at random; `make chaos ARGS="--seed 123"` does a run again
	@$(BIN)/python tests/chaos/run.py $(ARGS)

soak: .venv/.soak ## Fifteen minutes of a mixed load: does memory grow, are threads, sockets or sessions left?
	@$(BIN)/python tests/soak/run.py $(ARGS)

lint: .venv/.lint ## Check style, types and the layers of the package
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

bench: .venv/.bench ## Measure: handshakes, requests and seconds
	@$(BIN)/python -m bench $(ARGS)

clean: ## Remove .venv and what the tools leave
	@rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each dependency group: reinstalled when pyproject.toml has changed.
.venv/.%: .venv/.pip pyproject.toml
	@$(BIN)/python -m pip install --quiet --editable . --group $*
	@touch $@

.PRECIOUS: .venv/.%
.venv/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is older than Python 3.11: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@
