# Two commands matter on a fresh machine: `make demo` and `make test`. Both do their own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2
SEEDS ?= 1000
FIRST ?= 0
ROUNDS ?= 200
SECONDS ?=
SEED ?= 1
FUZZ_S ?= 60
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip warns about configured locations that do not hold a package; what matters is its exit status.
QUIET := --quiet --quiet

.PHONY: help
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, older than pyproject.toml means install again.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing covey with everything for development into $(VENV) (torch is large) ..."
	@$(PIP) install $(QUIET) --editable '.[dev]'
	@touch $(VENV)/.dev $(VENV)/.demo

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing covey[demo] into $(VENV) ..."
	@$(PIP) install $(QUIET) --editable '.[demo]'
	@touch $@

$(VENV)/.fuzz: pyproject.toml | setup
	@echo "installing covey[fuzz] into $(VENV) ..."
	@$(PIP) install $(QUIET) --editable '.[fuzz]'
	@touch $@

.PHONY: setup
setup: $(VENV)/.dev ## everything for development, into .venv

.PHONY: demo
demo: $(VENV)/.demo ## a fleet of simulated devices trains on real data (options: ARGS="--devices 20")
	@$(BIN)/covey demo $(ARGS)

.PHONY: test
test: setup ## all tests but those marked slow or arm64
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not arm64" $(ARGS)

.PHONY: test-slow
test-slow: setup ## the tests that take longer
	@$(BIN)/python -m pytest -m slow $(ARGS)

.PHONY: arm64
arm64: setup ## the device's package in aarch64 userlands of bookworm and trixie, under qemu
	@$(BIN)/python -m pytest tests/arm64 -m arm64 $(ARGS)

.PHONY: simulate
simulate: setup ## both sides under made-up faults, each from a seed (SEEDS=10000, FIRST=0)
	@cd tests && ../$(BIN)/python -m simulation --seeds $(SEEDS) --first $(FIRST) $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.fuzz ## coverage-guided fuzzing of all that reads others' bytes (FUZZ_S=60 seconds for each target)
	@cd tests && ../$(BIN)/python -m fuzz --seconds $(FUZZ_S) $(ARGS)

.PHONY: chaos
chaos: setup ## a real broker, coordinator and devices, killed and cut off at random (ROUNDS=200, SEED=1, SECONDS=)
	@PYTHONPATH=tests $(BIN)/python -m chaos --seed $(SEED) \
		$(if $(SECONDS),--seconds $(SECONDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: check
check: setup ## ruff, mypy (strict) and the architecture's laws
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: setup ## put the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: plans
plans: setup ## compile the shipped plans anew from their torch models
	@$(BIN)/python -m covey_fleet.models

.PHONY: vectors
vectors: setup ## write covey's own known-answer vectors anew (a change here changes the wire)
	@cd tests && ../$(BIN)/python -m vectors.make

.PHONY: docs
docs: setup ## the generated parts of docs/protocol.md
	@$(BIN)/python docs/generate.py

.PHONY: picture
picture: setup ## docs/images/demo.png, drawn from a real run of the demo
	@$(BIN)/python docs/images/demo.py

.PHONY: benchmarks
benchmarks: setup ## the benchmarks, with their bounds
	@$(BIN)/python benchmarks/plan_step.py
	@$(BIN)/python benchmarks/mask.py
	@$(BIN)/python benchmarks/manifest.py
	@$(BIN)/python benchmarks/join.py
	@$(BIN)/python benchmarks/transcript.py
	@$(BIN)/python benchmarks/device_footprint.py
	@$(BIN)/python benchmarks/coordinator_footprint.py

.PHONY: soak
soak: setup ## 500 rounds with 20 devices in one go: what every process holds after each (ARGS="--rounds 100")
	@$(BIN)/python benchmarks/soak.py $(ARGS)

.PHONY: stampede
stampede: setup ## 500 devices that lose their broker in the middle of a round (options: ARGS="--devices 100")
	@$(BIN)/python benchmarks/stampede.py $(ARGS)

.PHONY: deb
deb: setup ## Debian packages of the device, in dist/ (ARGS="--release trixie --arch arm64")
	@$(BIN)/python -m covey_packaging deb $(ARGS)

.PHONY: size
size: setup ## what a device takes on the disk, distribution by distribution, with its bounds (ARGS="--json FILE")
	@$(BIN)/python benchmarks/device_size.py $(ARGS)

.PHONY: wheels
wheels: setup ## choose anew, and lock, the wheels that the packages hold
	@$(BIN)/python -m covey_packaging wheels

.PHONY: attacks
attacks: setup ## every attack on a round, in memory and over a real mosquitto, and what becomes of it
	@$(BIN)/python -m pytest tests/attacks -m "not slow" -n $(JOBS) -q --no-header --listing $(ARGS)

.PHONY: mutants
mutants: setup ## remove each check of the protocol in turn: some test must go red
	@$(BIN)/python tests/attacks/mutants.py

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache covey-demo
