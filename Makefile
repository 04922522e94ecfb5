# kvray: everything that a developer types. On a fresh clone `make demo` and `make test` do the rest
# themselves. PYTHON=python3.12 chooses another interpreter; the locks are made with 3.11.

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VENV_RAY_LLM := .venv-ray-llm
VENV_GPU := .venv-gpu
# Any Python with torch and cupy will do; without one of its own the test says what is missing.
GPU_PYTHON ?= $(firstword $(wildcard $(VENV_GPU)/bin/python $(VENV)/bin/python) $(PYTHON))
LOCK := requirements/lock-vllm-0.32.txt
LOCK_RAY_LLM := requirements/lock-vllm-0.29.txt
SYSTEM_PACKAGES := $(shell grep -v '^\#' requirements/system-packages.txt)
TEST_PACKAGES := $(shell grep -v '^\#' requirements/test-packages.txt)
CLUSTER_PACKAGES := $(shell grep -v '^\#' requirements/cluster-packages.txt)
NGINX_PACKAGES := $(shell grep -v '^\#' requirements/nginx-packages.txt)

# Upper bounds of one run, in seconds: .ci/run has 60 minutes for those that it runs.
QUICK_LIMIT_S := 600
QUICK_SEEDS := 40
FUZZ_SECONDS := 60
TEST_LIMIT_S := 2700
SLOW_LIMIT_S := 1800
RAY_LLM_LIMIT_S := 2400
CLUSTER_LIMIT_S := 900
WHEEL_LIMIT_S := 1800

WHEEL_NOTES := $(CURDIR)/build/from-wheel/processes
runs_ray_llm = $(findstring ray-llm,$(RUN))$(findstring serve,$(RUN))

# Runs pytest so that no process outlives it, whatever happens in the tests.
pytest = $(1)/bin/python -m tests.contained --limit-s $(2) -- $(1)/bin/python -m pytest

.PHONY: help system system-test system-cluster system-nginx install install-ray-llm install-gpu \
    demo demo-serve demo-nginx test test-quick test-rest test-slow test-all test-cluster test-gpu test-ray-llm \
    test-ray-llm-slow fuzz wheel test-wheel install-wheel from-wheel sim mutants faults bench pictures \
    lint format clean

help:
	@echo 'make demo          two nodes, two engines, one document (installs what it needs first)'
	@echo 'make demo-serve    the same with two replicas of Ray Serve LLM, over HTTP'
	@echo 'make demo-nginx    the same with two vllm serve behind nginx; ARGS=start stays until Ctrl-C'
	@echo 'make test          unit, property, contract and integration tests, half an hour'
	@echo 'make test-quick    of it the unit tests, and some seeds of the simulator: two minutes'
	@echo 'make test-all      make test, and what is slower: before an issue is resolved'
	@echo 'make test-cluster  ray up and down with ray_cluster.yaml on three hosts made of namespaces'
	@echo 'make wheel         dist/: what to install on other machines'
	@echo 'make test-wheel    builds the wheel, and tries it in a clean environment'
	@echo 'make from-wheel RUN=TARGET   any of these with the wheel in place of the checkout'
	@echo 'make test-gpu      copies on a GPU: tests and the table of benchmarks/gpu.py; without vLLM'
	@echo 'make test-ray-llm  the engine tests with the pair of ray[llm], and Ray Serve LLM'
	@echo 'make test-ray-llm-slow   what of Ray Serve LLM is slower, and the other oracles'
	@echo 'make fuzz          hostile bytes, requests and arguments, a minute of each kind'
	@echo 'make sim           2,000 seeds of the cluster simulator, about a quarter of an hour'
	@echo 'make mutants       bugs planted one at a time: each must be caught'
	@echo 'make faults        real faults under load, about twenty minutes'
	@echo 'make bench         all benchmarks, and the page of them: over two hours on a quiet machine'
	@echo 'make pictures      docs/pictures, as the page looks in a browser'
	@echo 'make lint          ruff, mypy, import-linter'
	@echo 'make format        ruff format and the fixes that ruff is sure of'
	@echo 'make install       .venv from the pinned file; a second call does nothing'
	@echo 'make system        the Debian packages of requirements/system-packages.txt'
	@echo 'make system-test   and those that tests need: a browser'
	@echo 'make system-cluster   and those of the hosts of make test-cluster: sshd, rsync'
	@echo 'make system-nginx  and nginx, of make demo-nginx'
	@echo 'make clean         removes the environments and caches'

# Root installs what is missing; anybody else is told. Where all is there, nothing is asked or run.
system:
	$(call debian_packages,$(SYSTEM_PACKAGES))

system-test: system
	$(call debian_packages,$(TEST_PACKAGES))

system-cluster: system
	$(call debian_packages,$(CLUSTER_PACKAGES))

system-nginx: system
	$(call debian_packages,$(NGINX_PACKAGES))

# policy-rc.d: Debian starts the service of a package that it installs, and nginx would listen on
# port 80. Where a policy is there already, it stays.
define debian_packages
	@missing=''; \
	for package in $(1); do \
	    dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' \
	        || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	    echo "not a Debian system: kvray needs, under the names they have here:$$missing"; exit 0; \
	fi; \
	if [ "$$(id -u)" != 0 ]; then \
	    echo "missing system packages; please run: sudo apt-get install$$missing" >&2; exit 1; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	if [ ! -e /usr/sbin/policy-rc.d ]; then \
	    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
	    trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
	fi; \
	install="apt-get install -y -q --no-install-recommends$$missing"; \
	$$install || { apt-get update -q && $$install; }
endef

install: $(VENV)/.installed

install-ray-llm: $(VENV_RAY_LLM)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	$(call build_environment,$(VENV),$(LOCK))

$(VENV_RAY_LLM)/.installed: $(LOCK_RAY_LLM) pyproject.toml
	$(call build_environment,$(VENV_RAY_LLM),$(LOCK_RAY_LLM))

# --no-deps: the lock is the whole environment, nothing is resolved. The stamp is written last, so
# an interrupted installation goes on where it stopped.
define build_environment
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "kvray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1)
	@echo "installing $$(grep -c '==' $(2)) pinned packages into $(1) (a few minutes the first time)"
	@$(1)/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-deps -r $(2)
	@$(1)/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-deps \
	    --no-build-isolation --editable .
	@touch $@
endef

demo: system install
	$(VENV)/bin/python examples/two_nodes.py $(ARGS)

demo-serve: system install-ray-llm
	$(VENV_RAY_LLM)/bin/python examples/serve_llm.py $(ARGS)

demo-nginx: system-nginx install
	$(VENV)/bin/python examples/behind_nginx $(ARGS)

test: system-test install
	$(call pytest,$(VENV),$(TEST_LIMIT_S)) -m 'not slow and not ray_llm' $(ARGS)

# What needs no engine and no cluster. With test-rest it is make test, each test once.
test-quick: system-nginx install
	$(call pytest,$(VENV),$(QUICK_LIMIT_S)) tests/unit \
	    -m 'not slow and not ray_llm' $(ARGS)
	$(VENV)/bin/python -m tests.sim --seeds $(QUICK_SEEDS)

test-rest: system-test install
	$(call pytest,$(VENV),$(TEST_LIMIT_S)) --ignore=tests/unit -m 'not slow and not ray_llm' $(ARGS)

test-slow: system-test system-cluster system-nginx install
	$(call pytest,$(VENV),$(SLOW_LIMIT_S)) -m 'slow and not ray_llm' $(ARGS)

fuzz: install
	@$(VENV)/bin/python -m tests.contained --limit-s $(QUICK_LIMIT_S) -- \
	    $(VENV)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

test-all: test test-slow fuzz

wheel: install
	$(VENV)/bin/python -m build

# Builds sdist and wheel, and tries the wheel in a clean environment. ARGS='--extra cpu': one more.
test-wheel: system install
	@$(VENV)/bin/python -m tests.contained --limit-s $(WHEEL_LIMIT_S) -- \
	    $(VENV)/bin/python -m tests.wheel $(ARGS)

install-wheel: install $(if $(runs_ray_llm),install-ray-llm)
	$(VENV)/bin/python -m tests.wheel.layered $(VENV) $(if $(runs_ray_llm),$(VENV_RAY_LLM))

# Any other target where kvray is what the wheel has installed: make from-wheel RUN=test-cluster.
# -o: the environments there are hard links to those here, made just now.
from-wheel: install-wheel
	@rm -rf $(WHEEL_NOTES) && mkdir -p $(WHEEL_NOTES)
	@env -u PYTHONPATH KVRAY_FROM_WHEEL=$(WHEEL_NOTES) $(MAKE) -C build/from-wheel \
	    -o install -o install-ray-llm \
	    VENV=$(CURDIR)/$(VENV)-wheel VENV_RAY_LLM=$(CURDIR)/$(VENV_RAY_LLM)-wheel $(RUN)
	@$(VENV)/bin/python -m tests.wheel.guard $(WHEEL_NOTES)

# What it does goes to stderr, its result as one line of JSON to stdout.
test-cluster: system-cluster install
	@$(VENV)/bin/python -m tests.contained --limit-s $(CLUSTER_LIMIT_S) -- \
	    $(VENV)/bin/python -m tests.cluster

# What a machine needs for it: a GPU, torch, cupy. It says why it does nothing where there is none.
test-gpu:
	$(GPU_PYTHON) -m tests.gpu $(ARGS)

# Not pinned as a whole, for it is not what kvray is used with: torch brings CUDA's own packages.
install-gpu: $(VENV_GPU)/.installed

$(VENV_GPU)/.installed: requirements/gpu.txt
	@test -x $(VENV_GPU)/bin/python || "$(PYTHON)" -m venv $(VENV_GPU)
	@$(VENV_GPU)/bin/python -m pip install -qq --no-input --disable-pip-version-check \
	    -r requirements/gpu.txt
	@touch $@

test-ray-llm: system install-ray-llm
	$(call pytest,$(VENV_RAY_LLM),$(RAY_LLM_LIMIT_S)) -m '(engine or ray_llm) and not slow' $(ARGS)

test-ray-llm-slow: system install-ray-llm
	$(call pytest,$(VENV_RAY_LLM),$(RAY_LLM_LIMIT_S)) -m 'not engine and not ray_llm' \
	    tests/integration/test_oracle_*.py $(ARGS)
	$(call pytest,$(VENV_RAY_LLM),$(RAY_LLM_LIMIT_S)) -m 'ray_llm and slow' $(ARGS)

sim: install
	$(VENV)/bin/python -m tests.sim --seeds 2000 $(ARGS)

mutants: install
	$(VENV)/bin/python -m tests.mutants $(ARGS)

faults: system install
	$(VENV)/bin/python benchmarks/faults.py $(ARGS)

bench: system-nginx install install-ray-llm
	$(VENV)/bin/python benchmarks/report.py $(ARGS)

pictures: system-test install
	KVRAY_PICTURES=docs/pictures $(call pytest,$(VENV),$(TEST_LIMIT_S)) tests/integration/test_page_live.py \
	    tests/integration/test_page_looks.py tests/integration/test_ray_dashboard.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV_RAY_LLM) $(VENV_GPU) $(VENV)-wheel $(VENV_RAY_LLM)-wheel dist .cache \
	    .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache build *.egg-info
