# Sets the project up and runs it. Needs git, make and Python 3.11 or later; `make` lists the targets.

VENV := .venv
PYTHON ?=
ARGS :=
METHODS := bads,mixing,meta_only,random_select,dup_meta
DEV := .[dev,text,llm,sweep]

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup run results test test-all lint format clean check-python

help: ## List the targets
	@sed -n -e 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
	  while IFS='|' read -r target text; do printf 'make %-9s %s\n' "$$target" "$$text"; done

setup: $(READY) ## Set up what running needs, in .venv, once
	@echo "$(VENV) is ready"

run: $(READY) ## Select data on MNIST (continues a run that is there); make run ARGS="seed=1 method=mixing"
	@$(PY) -m inference.run task=mnist resume=true $(ARGS)

results: $(READY) ## Measure the tables of docs/results.md: 5 seeds, 6 methods, 5 set-ups (some five hours)
	@$(PY) -m inference.run -m resume=true seed=0,1,2,3,4 method=$(METHODS) task=mnist \
	  task.meta_per_class=25,5
	@$(PY) -m inference.run -m resume=true seed=0,1,2,3,4 method=$(METHODS) task=mnist10
	@$(PY) -m inference.run -m resume=true seed=0,1,2,3,4 method=blo task=mnist10 chains=2
	@$(PY) -m inference.run -m resume=true seed=0,1,2,3,4 method=$(METHODS),blo \
	  task=mnist10_noise,mnist10_noisy chains=2
	@$(PY) -m inference.run -m resume=true seed=0,1,2,3,4 method=bads model=joint impact.weight=20 \
	  task=mnist10_noise,mnist10_noisy chains=2
	@$(PY) -m inference.report runs

test: lint ## Set up, check style and types, run the tests; fewer: make test ARGS="-m 'not slow'"
	@$(PY) -m pytest -n 2 --dist load --maxschedchunk 1 $(ARGS)

test-all: ## The same with each of Python 3.11, 3.12 and 3.13 that is there (6 GB of disk each)
	@tested=; failed=; \
	for version in 3.11 3.12 3.13; do \
	  "python$$version" -c '' 2>/dev/null || continue; \
	  tested="$$tested $$version"; \
	  $(MAKE) --no-print-directory test PYTHON="python$$version" VENV=".venv-$$version" \
	    || failed="$$failed $$version"; \
	done; \
	if [ -z "$$tested" ]; then \
	  echo "error: none of python3.11, python3.12 and python3.13 runs; install one of them" >&2; exit 1; \
	fi; \
	echo "Tested with Python$$tested; failed with:$${failed:- none}"; [ -z "$$failed" ]

lint: $(READY_DEV) ## Check style and types
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { \
	  echo "error: some files are not laid out as ruff would; run: make format" >&2; exit 1; }
	@$(PY) -m mypy

format: $(READY_DEV) ## Lay the code out and mend what can be mended
	@$(PY) -m ruff check --quiet --fix-only .
	@$(PY) -m ruff format --quiet .

clean: ## Remove environments and caches; runs and data stay
	rm -rf .venv .venv-3.* .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

check-python:
	@$(find_python); echo "$$python"

# Sets $python to the first candidate that is new enough and can make virtual environments.
define find_python
python=; seen=; lacking=; \
for candidate in $(CANDIDATES); do \
  version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
  seen="$$seen $$candidate is Python $$version;"; \
  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
  "$$candidate" -c 'import ensurepip, venv' 2>/dev/null || { lacking="$${lacking:-$$version}"; continue; }; \
  python=$$candidate; break; \
done; \
if [ -z "$$python" ] && [ -n "$$lacking" ]; then \
  echo "error: Python $$lacking is there, but its venv or ensurepip module is not;" >&2; \
  echo "  add it (Debian and Ubuntu: apt-get install python$$lacking-venv), or name another" >&2; \
  echo "  interpreter: make setup PYTHON=/path/to/python3" >&2; exit 1; \
elif [ -z "$$python" ]; then \
  echo "error: Python 3.11 or later is needed, and none of $(CANDIDATES) is one" >&2; \
  echo "  (found:$${seen:- none of them runs})" >&2; \
  echo "  install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
fi
endef

# Installs $(1). The marks go first and come back last, so that a set-up which was interrupted
# finds none and starts again with an empty environment.
define install
@set -e; \
if [ -e $(READY) ] && $(PY) -c '' 2>/dev/null; then \
  echo "Bringing $(VENV) up to date"; \
  rm -f $(READY) $(READY_DEV); \
else \
  $(find_python); \
  echo "Setting up $(VENV) with $$python (once; torch alone is several gigabytes)"; \
  "$$python" -m venv --clear $(VENV); \
fi; \
$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef

$(READY): pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(READY_DEV): pyproject.toml constraints.txt
	$(call install,$(DEV))
	@touch $(READY) $@
