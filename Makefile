# make demo    set up, then train the tiny model here, on two processes, to the end of its first phase
# make test    set up, then check style, types and floors, then run all tests
# make check   style, types and floors alone
# make prove-checkpoints   the slow proof: 500 kills of each engine, no checkpoint lost (forty minutes)
# make prove-corruption    the slow proof: 10,000 damages of each engine's, each found, named and passed over (some minutes)
# make prove-timeouts      the slow proof: four runs on a real Slurm through 200 time-outs (root; three quarters of an hour)
# make prove-inertness     the slow proof: 100,000 cases of shell metacharacters in what users control (20 minutes of CPU)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slurm-packages browser check format clean prove-inertness prove-checkpoints prove-corruption prove-timeouts

install: .venv/installed

.venv/installed: constraints.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[dev]
	@# DeepSpeed's own set-up imports torch, so it comes after it and without a build environment of its own
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	@# where there is no Slurm, sbatch in this environment says so and what to type instead
	@command -v sbatch >/dev/null || install -m 755 slurm/sbatch-without-slurm .venv/bin/sbatch
	@touch $@

demo: install
	$(BIN)/python -m launchers.submit --phase sanity_check --config configs/tiny.yaml --cluster local

test: slurm-packages browser check
	@# two at a time: the tests on a real Slurm wait for its clocks half of their time
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# Debian's Slurm for the tests on a real cluster, tmux for those in a real terminal; without root they skip and say so
slurm-packages: install
	@missing=$$($(BIN)/python -c 'from launchers.sandbox.preflight import missing_packages as m; print(*m())'); \
	command -v tmux >/dev/null || missing="$$missing tmux"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
	fi

# Debian's Chromium for the tests that look at reports; without root they skip and say so
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	fi

prove-checkpoints: install
	for engine in fsdp2 zero3; do $(BIN)/python -m benchmarks.kills --sharding $$engine --kills $(or $(KILLS),500) || exit; done

prove-corruption: install
	for engine in fsdp2 zero3; do \
	    $(BIN)/python -m benchmarks.corruption --sharding $$engine --injections $(or $(INJECTIONS),10000) || exit; \
	done

prove-timeouts: slurm-packages
	$(BIN)/python -m benchmarks.timeouts --continuations 200 --early $(or $(EARLY),60)

prove-inertness: install
	$(BIN)/python -m benchmarks.inertness --cases $(or $(CASES),100000)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build runs data output logs *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
