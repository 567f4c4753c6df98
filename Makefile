# Two commands set everything up and run it: `make demo` and `make test`.
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup check fmt lint unit test test-kernel test-systemd test-newer shell-kernel soak
.PHONY: test-guests test-programs test-engines demo bench bench-layers bench-docker bench-clients
.PHONY: bench-snapshots bench-diff clean-leftovers machines

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Debian packages (as root), virtual environment, the package itself

$(STAMP): pyproject.toml setup.py tools/setup.sh $(wildcard src/devmapper/server/containerd/api/*.proto)
	@tools/setup.sh $(VENV)
	@touch $@

check: $(STAMP) lint unit ## format, lint, types, unit tests: under a minute

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: $(STAMP)
	$(PY) -m pytest -q -n auto tests/unit

fmt: $(STAMP) ## format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Each lane leaves a processor idle half of its time: it waits for programs, disks and the guests
test: $(STAMP) lint machines ## everything; what this machine cannot run is named at the end
	$(PY) -m pytest -q -n auto tests/unit
	@echo "three lanes side by side, each printed when it ends: some ten minutes"
	@$(MAKE) --no-print-directory --keep-going --jobs=3 --output-sync=target test-guests test-programs test-engines

test-guests: $(STAMP) # the tests of the kernel's device mapper
	$(PY) -m pytest -q -m kernel tests

test-programs: $(STAMP) # whole programs on this machine
	$(PY) -m pytest -q -m "not kernel" tests/e2e

test-engines: $(STAMP) # the rest
	$(PY) -m pytest -q -m "not kernel" tests --ignore=tests/unit --ignore=tests/e2e

machines: $(STAMP) # what virtual machines boot, fetched once; a guest has no network to do it
	@$(PY) -m tests.support.vm

test-kernel: $(STAMP) machines ## the tests of the kernel's device mapper alone, ARGS="-k suspend -x" for pytest
	$(PY) -m pytest -m kernel tests $(ARGS)

test-systemd: $(STAMP) ## our unit under a real systemd in a guest, the long cases too
	$(PY) -m pytest -m "systemd or soak" tests/e2e/test_systemd.py $(ARGS)

shell-kernel: $(STAMP) ## a shell on a kernel with dm-thin, a pool ready; nothing of it stays
	@$(PY) -m tests.uml

test-newer: $(STAMP) ## newer clients: Docker and containerd of Debian's later suites, ARGS for pytest
	@$(PY) -m tests.support.debian
	$(PY) -m pytest -q -m newer tests/newer $(ARGS)

soak: $(STAMP) ## long runs: thousands of model steps, a hundred SIGKILLs, clients for ten minutes
	MODEL_STEPS=5000 KILLS=100 SOAK_SECONDS=600 DIFF_EXAMPLES=200 $(PY) -m pytest -q -o faulthandler_timeout=0 --timeout 7200 \
		tests/crash tests/unit/t4_metadata.py tests/conformance/test_diff_edits.py
	$(PY) -m pytest -q -o faulthandler_timeout=0 --timeout 7200 -m soak tests/e2e

demo: $(STAMP) ## a Debian root file system becomes layers, before your eyes
	@$(PY) tools/demo.py

bench: $(STAMP) ## layers, mounts and fio beside a plain loop device and qcow2
	$(PY) tools/bench.py

bench-layers: $(STAMP) ## a thousand layers: the 10th, 100th, 1000th, and opening them; ENGINE=uml for a guest
ifeq ($(ENGINE),uml)
	$(PY) -m tests.uml run --disk 8G -- $(PY) tools/bench_layers.py --engine kernel --directory /scratch
else
	$(PY) tools/bench_layers.py --engine $(or $(ENGINE),auto)
endif

bench-docker: $(STAMP) ## the kernel engine beside Docker's own driver, in User Mode Linux
	$(PY) tools/bench_docker.py

bench-clients: $(STAMP) ## Docker's plugin and containerd's snapshotter beside their own, in User Mode Linux
	$(PY) tools/bench_clients.py

bench-diff: $(STAMP) ## diff of a layer of 1 GiB with ten changed files; ENGINE=uml for a guest
ifeq ($(ENGINE),uml)
	$(PY) -m tests.uml run --disk 8G -- $(PY) tools/bench_diff.py --engine kernel --directory /scratch
else
	$(PY) tools/bench_diff.py --engine $(or $(ENGINE),auto)
endif

bench-snapshots: $(STAMP) ## a daemon with ten thousand snapshots: list, memory, restart
	$(PY) tools/bench_snapshots.py --engine $(or $(ENGINE),auto)

clean-leftovers: $(STAMP) ## remove what killed tests left behind (loop devices, mounts, processes)
	$(PY) -m tests.support.leftovers
