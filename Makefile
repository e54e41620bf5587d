# Everything a reader or contributor runs. `make` alone lists the targets.
# Settings, each overridable: make test VENV=/elsewhere JOBS=8
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= 2
PORT ?= 8000
PIP_ARGS ?=
# The first interpreter that runs, is 3.11 to 3.13 and can make environments (a pyenv shim may exist and yet not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import ensurepip, sys, venv; assert (3, 11) <= sys.version_info[:2] <= (3, 13); print(sys.executable)' \
	2>/dev/null && break; done)

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ENGINES ?= verl trl vllm
STEPS := lint types html unit chapters

# One torch thread per test worker; no test may reach a model hub.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST = $(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -rfE
WITHOUT_BROWSER = $(if $(shell command -v chromium),,-m 'not browser')

.PHONY: help env book test test-engines quick serve clean $(STEPS)

help: ## List the targets (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Settings: VENV=$(VENV)  PYTHON=python3.12  JOBS=$(JOBS)  PORT=$(PORT)  PIP_ARGS='--extra-index-url ...'"

env: $(STAMP) ## Create the virtual environment (again only when its two files change)

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(PY) ]; then \
	  python="$(PYTHON)"; \
	  if [ -z "$$python" ]; then \
	    echo "make env: found no Python 3.11 to 3.13 that has venv. Name one: make env PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating $(VENV) with $$python"; \
	  "$$python" -m venv $(VENV); \
	fi
	@echo "Installing rlvr_lab with its book and test tools, about 5 minutes; full output in $(VENV)/install.log"
	@set -o pipefail; resolved=0; downloaded=0; \
	$(PY) -m pip install --disable-pip-version-check --no-input --progress-bar off \
	  -c constraints.txt -e '.[book,dev]' $(PIP_ARGS) 2>&1 \
	| tee $(VENV)/install.log \
	| while IFS= read -r line; do \
	  case "$$line" in \
	    "WARNING: Location "*" is ignored: "*) ;; \
	    Collecting*) resolved=$$((resolved + 1)); \
	      if ((resolved % 25 == 0)); then echo "  $$resolved packages looked up"; fi ;; \
	    Downloading*|"Using cached"*) downloaded=$$((downloaded + 1)); \
	      if ((downloaded % 25 == 0)); then echo "  $$downloaded packages fetched"; fi ;; \
	    "Installing collected"*) echo "  unpacking and compiling, the longest part" ;; \
	    WARNING*|ERROR*|error*) echo "$$line" ;; \
	  esac; \
	done \
	|| { grep -v 'is ignored: it is neither' $(VENV)/install.log | tail -n 40; \
	  echo "make env: pip failed; the lines above are the end of $(VENV)/install.log" >&2; exit 1; }
	@touch $@
	@echo "Ready: $(VENV)"

book: env ## Train a small policy, put its figures in the book, build _build/html
	$(PY) book/_tools/make_book.py

test: env ## Everything CI checks: lint, types, html, unit, chapters
	@failed=; summary=; \
	for step in $(STEPS); do \
	  printf '\n=== make %s\n' "$$step"; start=$$SECONDS; result=passed; \
	  $(MAKE) --no-print-directory "$$step" || { result=FAILED; failed="$$failed $$step"; }; \
	  summary+="$$(printf '  %-9s %s %5d s' "$$step" "$$result" "$$((SECONDS - start))")"$$'\n'; \
	done; \
	printf '\n=== make test\n%s' "$$summary"; \
	if [ -n "$$failed" ]; then echo "  failed:$$failed"; exit 1; fi

# Each engine has an environment of its own, because their pins exclude each other.
test-engines: env ## Compare with verl, TRL and vLLM themselves; about 15 minutes the first time
	$(PY) -m nox -s $(ENGINES)

lint: env ## ruff: rules, then formatting
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	exit $$status

types: env ## mypy, strict
	$(PY) -m mypy

html: env ## Build the book from the stored outputs, without training; warnings are errors
	$(PY) book/_tools/build_book.py

unit: env ## pytest over tests/; browser tests only where chromium is installed
	@command -v chromium >/dev/null || \
	  echo "no chromium: browser tests are left out (Debian: apt-get install chromium chromium-driver)"
	$(PYTEST) --durations=10 --durations-min=5 $(WITHOUT_BROWSER)

chapters: env ## Run every chapter and compare the checked cells with the stored outputs
	$(PYTEST) -p no:cacheprovider --nbval-lax --nbval-current-env \
	  --nbval-sanitize-with tests/book/nbval_sanitize.cfg book/*/*.ipynb

quick: env lint types ## The inner loop, under two minutes: lint, types, fast tests
	$(PYTEST) -m 'not slow and not browser'

serve: ## Show the built book at http://127.0.0.1:8000
	@test -f _build/html/index.html || { echo "make serve: no book in _build/html; run make book first" >&2; exit 1; }
	@test -x $(PY) || { echo "make serve: no environment in $(VENV); run make env first" >&2; exit 1; }
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

clean: ## Remove the built book and all caches; keeps .venv and runs/
	rm -rf _build book/_build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlvr_lab tests book -name __pycache__ -type d -prune -exec rm -rf {} +
