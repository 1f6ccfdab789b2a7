# Everything on a fresh machine with python3 (3.10 or newer), make, git and a C compiler.
#   make demo    install, draw a labelled JPEG set, train two ranks on it (about 2 minutes on 2 cores)
#   make test    install, run the tests (14 minutes on 2 idle cores)
#   make test-faults    install, run the long fault injection
#   make test-slurm     install, run the launcher on a real SLURM (apt-get install slurmctld slurmd slurm-client)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
RANKS ?= 2
# Tests run side by side, a file of them in one process: most wait for processes of their own.
WORKERS ?= 2
# Ranks share the cores: more threads than cores only makes them fight.
THREADS := $(shell n=$$(( $$(nproc) / $(RANKS) )); [ $$n -ge 1 ] && echo $$n || echo 1)

# Where Python may not keep what it compiles, every process compiles torch anew: 7 of the 12 CPU seconds of our imports.
export PYTHONDONTWRITEBYTECODE :=

SYNC := pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock

.PHONY: install demo test test-faults test-slurm lint lock clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "imagenet-trainer needs Python 3.10 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/uv
	@# uv brings its own certificates; behind a proxy that signs for itself those of the system are needed, as pip uses them.
	$(BIN)/uv $(SYNC) || $(BIN)/uv --system-certs $(SYNC)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	@[ -d data/demo ] || $(BIN)/python -m trainer prepare demo data/demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m trainer train configs/demo.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not faults and not slurm" --numprocesses $(WORKERS) --dist loadfile --durations 30

test-faults: install
	$(BIN)/python -m pytest -m faults

test-slurm: install
	$(BIN)/python -m pytest -m slurm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The same pins on every machine; no index is named, so each machine's own settings apply.
lock: | $(BIN)/uv
	$(BIN)/uv pip compile --quiet pyproject.toml --extra cuda13 --extra parquet --extra export --extra tensorboard --extra dev --universal --python-version 3.10 \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
