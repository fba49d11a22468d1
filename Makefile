# Everything runs in .venv, made from constraints.txt; nothing but GNU make, bash and Python 3.11 or newer has to be there.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
WORKERS ?= 2
TORCH := 2.13.0

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,tensorboard,trackio
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check types soak bench constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.12 make ...   another interpreter (after make clean)"
	@echo "WORKERS=8 make test          more test processes than 2"
	@echo "On Linux pip takes PyTorch's CUDA build. For the much smaller CPU build:"
	@echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make ..."

demo: $(VENV)/.runtime ## install, then align a tiny model by self-play and show what it gained
	$(BIN)/sparring demo

test: $(VENV)/.dev ## the tests
	$(PYTEST)

check: $(VENV)/.dev ## what CI runs: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j 2 types test

types: $(VENV)/.dev
	$(BIN)/mypy

soak: $(VENV)/.dev ## the slow tests
	$(BIN)/python -m pytest -m slow -n $(WORKERS)

bench: $(VENV)/.dev ## short forms of the benchmarks, under 10 minutes; without lora_memory.py, and the long demo_table.py, methods_table.py, planted_error.py, noisy_judge.py, bcr.py
	@for script in step_vs_trl generation sapo_loop scaling compiled gpu; do \
	  echo "== $$script"; $(BIN)/python benchmarks/$$script.py --quick; done

constraints: ## resolve constraints.txt anew, with Python 3.11
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "constraints.txt is made with Python 3.11, the oldest that is supported: PYTHON=python3.11 make constraints")'
	$(PYTHON) -m venv --clear $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install -q --upgrade --upgrade-strategy eager torch==$(TORCH) '.[$(EXTRAS)]'
	@{ echo "# Every version that 'make' installs. Made by 'make constraints' with Python 3.11 and torch==$(TORCH); not edited by hand."; \
	  echo "# PyTorch's own CUDA packages are left to it: its build decides them."; \
	  $(VENV)-constraints/bin/python -m pip list --format freeze --exclude pip --exclude sparring \
	    | grep -viE '^(nvidia-|cuda-|triton=)' | sed 's/+.*//'; } > constraints.txt
	rm -rf $(VENV)-constraints

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) $(VENV)-constraints build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { echo "Sparring needs Python 3.11 or newer, and there is no $(PYTHON): PYTHON=/path/to/python3 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sparring needs Python 3.11 or newer; $(PYTHON) is %d.%d: PYTHON=python3.11 make ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing Sparring into $(VENV) ..."
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing Sparring and its development tools into $(VENV) ..."
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(VENV)/.runtime $@
