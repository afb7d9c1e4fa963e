# Two commands on a fresh machine: `make tune` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help tune test check bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without an NVIDIA GPU the CPU build of torch is enough, and gigabytes smaller.
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CONSTRAINTS := $(if $(GPU),,-c constraints/cpu.txt)
EXTRAS := $(if $(GPU),dev$(comma)cuda,dev)
comma := ,
# Two test processes: ranks use the cores anyhow. On GPUs one, so that no two tests share a device.
TESTERS := $(if $(GPU),,-n 2 --dist loadfile --no-loadscope-reorder)

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints/cpu.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(GPU),,$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) torch)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

tune: $(STAMP) ## measure this machine, write its profile, print table and decision
	@$(BIN)/fusewise tune

# Hundreds of processes start; without bytecode on disk each would compile what it imports anew.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## every test this machine can run
	@$(BIN)/python -m tests.vllm_sources
	@$(BIN)/python -m tests.sglang_sources
	@$(BIN)/python -m pytest $(TESTERS)

check: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP) ## every path at every size, in nccl-tests' columns
	@$(BIN)/fusewise bench

clean: ## remove what make and the tests made; profiles stay
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
