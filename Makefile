# `make quickstart` trains the pocket policy on this machine, `make quickstart-smollm2` SmolLM2; `make test` runs every test.
# All make .venv from requirements/cpu.lock when it is missing or older than the lock, and not otherwise.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# pip installs PyTorch's CPU build where it sees one; elsewhere PyTorch's own index of CPU wheels is added.
TORCH := $(shell grep -E '^torch==' requirements/cpu.lock)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
# Twice quiet: errors are printed, and no warnings of what is not there to look in.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps

# Each quickstart is a run of its own, so that none overwrites another.
STAMP := $(shell date +%m%d-%H%M%S)

.PHONY: quickstart quickstart-smollm2 test test-fast lint format lock pocket starter env clean

quickstart: CONFIG := pocket.yaml
quickstart-smollm2: CONFIG := smollm2.yaml
quickstart quickstart-smollm2: $(READY)
	@test -d data/demo || $(BIN)/agentrl data demo --out data/demo
	@test -d data/demo/index || $(BIN)/agentrl index build --corpus data/demo/corpus.jsonl --out data/demo/index
	$(BIN)/agentrl train --config $(CONFIG) data.root=data name=$@-$(STAMP)
	@echo "look at it:         $(BIN)/agentrl rollout --config $(CONFIG) --quick --adapter runs/$@-$(STAMP)/adapter data.root=data"
	@echo "evaluate it again:  $(BIN)/agentrl eval --config $(CONFIG) --adapter runs/$@-$(STAMP)/adapter data.root=data"

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Makes pocket_policy/ anew, from nothing.
pocket: $(READY)
	$(BIN)/agentrl pocket

# Trains starter/ anew: needs AGENTRL_DATA with the question sets and the index that configs/starter.yaml names.
starter: $(READY)
	$(BIN)/agentrl warmstart --config starter.yaml

lock:
	$(PYTHON) requirements/lock.py

env: $(READY)

$(READY): requirements/cpu.lock pyproject.toml setup.py
	@echo "installing into $(VENV), which takes about five minutes and 4 GB"
	@echo "1/3 a Python environment"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "2/3 the $$(grep -c == requirements/cpu.lock) packages of requirements/cpu.lock"
	@start=$$(date +%s); \
	if $(PIP) --dry-run --no-index $(TORCH) >/dev/null 2>&1; then extra=""; else extra="--extra-index-url $(CPU_WHEELS)"; fi; \
	$(PIP) $$extra -r requirements/cpu.lock && echo "    in $$(($$(date +%s) - start)) s"
	@echo "3/3 agentrl itself, as this folder"
	@$(PIP) --no-build-isolation --editable .
	@touch $(READY)

clean:
	rm -rf $(VENV)
