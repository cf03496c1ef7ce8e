# Every target that needs the virtual environment makes it first: a fresh clone wants no other step.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The project's photographs, which a fresh clone lacks; rows without them are a trial's.
SCENES ?= $(wildcard ../shared/scenes)
PHOTOGRAPHS = $(if $(SCENES),--scenes $(SCENES),--rows quality-out/rows.jsonl)
LOAD_RATE ?= 1
LOAD_DURATION ?= 30

# No usage reports, and no request to a model hub, from anything that is started here.
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install check test test-gpu test-slow demo serve bench bench-kernels bench-load \
	bench-peer bench-ranking bench-registry bench-training soak quality sweep ablation confusion gate nano nano-report adapt-report targets \
	lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the project into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version);" \
			"name another: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; \
		exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

check: $(STAMP) ## lint, format, types, import rules, forbidden packages
	@! $(BIN)/python -m pip freeze | grep -iE '^(torchvision|kernels)==' || { \
		echo "These must not be installed: torchvision breaks beside a CPU torch, and kernels" \
			"takes the name of our package. Remove them: $(BIN)/pip uninstall torchvision kernels"; \
		exit 1; }
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) ## run the tests on up to four cores, without the slow ones and those that need a GPU
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Status 5 says that no test carries the marker.
test-slow: $(STAMP) ## run the tests that take more than a minute
	$(BIN)/python -m pytest -m "slow and not gpu" || [ $$? -eq 5 ]

test-gpu: $(STAMP) ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu || [ $$? -eq 5 ]

demo: $(STAMP) ## train two scenes on photographs, serve them, complete over HTTP, write demo-out/
	$(BIN)/realfill demo

serve: $(STAMP) ## serve the registry in ./realfill-registry (or REALFILL_REGISTRY) on 127.0.0.1:3000
	$(BIN)/realfill serve

bench: $(STAMP) ## measure swap, engine and service on this machine, and record the rows
	$(BIN)/python -m benchmarks.engine

bench-kernels: $(STAMP) ## measure every kernel beside torch and the machine's limits
	$(BIN)/python -m benchmarks.kernels

bench-load: $(STAMP) ## 30 s of open-loop load on the demo scenes, into load-out/
	$(BIN)/python -m benchmarks.load.local --demo-command "$(BIN)/realfill demo" \
		--serve-command "$(BIN)/realfill serve" --rate $(LOAD_RATE) --duration $(LOAD_DURATION)

bench-peer: $(STAMP) ## good answers per second beside a server written in an afternoon, 10 minutes
	$(BIN)/python -m benchmarks.load.compare

bench-registry: $(STAMP) ## measure the registry, and MLflow's client in an environment of its own
	$(BIN)/python -m benchmarks.registry

bench-training: $(STAMP) ## operations of training beside the public script's, and its time without a pool
	$(BIN)/python -m benchmarks.training

bench-ranking: $(STAMP) ## 16 candidates against 3 references, beside plain kornia, and matches against truth
	$(BIN)/python -m benchmarks.ranking

soak: $(STAMP) ## 30 minutes of load without mercy on the real server, into soak-out/
	$(BIN)/python -m benchmarks.soak

quality: $(STAMP) ## do adapters beat the base, and does ranking help; into quality-out/
	$(BIN)/python -m benchmarks.quality.tables $(PHOTOGRAPHS)

sweep: $(STAMP) ## how few steps are enough, into quality-out/
	$(BIN)/python -m benchmarks.quality.sweep $(PHOTOGRAPHS)

ablation: $(STAMP) ## which choices of the method matter (trains each anew), into quality-out/
	$(BIN)/python -m benchmarks.quality.ablation $(PHOTOGRAPHS)

confusion: $(STAMP) ## does the matcher tell places apart
	$(BIN)/python -m benchmarks.quality.confusion $(PHOTOGRAPHS)

gate: $(STAMP) ## how far the verdicts on answers can be trusted, and their thresholds
	$(BIN)/python -m benchmarks.quality.gate $(PHOTOGRAPHS)

nano: $(STAMP) ## train the embedded base and matcher from nothing (hours on a CPU)
	$(BIN)/realfill pretrain

nano-report: $(STAMP) ## measure nano on images that it never saw
	$(BIN)/python -m benchmarks.quality.nano_report $(PHOTOGRAPHS)

adapt-report: $(STAMP) ## adapt the demo and the shared scenes, and compare with the base alone
	$(BIN)/python -m benchmarks.quality.adapt_report $(PHOTOGRAPHS)

targets: $(STAMP) ## print the targets that are missed or not yet measured
	@$(BIN)/python -m benchmarks.record targets

lock: $(STAMP) ## pin what is installed: constraints.txt and requirements.txt
	$(BIN)/python .ci/lock.py

clean: ## remove what commands wrote, the demo's registry too, but neither .venv nor what took hours to train
	rm -rf dist demo-out load-out soak-out quality-out .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache *.egg-info
	test ! -d build || find build -mindepth 1 -maxdepth 1 -not -name nano -exec rm -rf {} +
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
