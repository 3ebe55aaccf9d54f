# `make train` and `make test` do all the set-up themselves, once.
PYTHON ?= python3
BIN := .venv/bin
ENV ?= Pendulum-v1
SEED ?= 0
SOURCES := sb3_boom tests scripts benchmarks

.PHONY: train test slow lint type format evidence clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

# Trains, evaluates planner and policy prior, and prints where model, curve and CSV are
train: .venv/.installed
	$(BIN)/python scripts/train.py --env $(ENV) --seed $(SEED)

test: .venv/.installed
	$(BIN)/python -m pytest

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/black --check --quiet $(SOURCES)

type: .venv/.installed
	$(BIN)/mypy sb3_boom scripts benchmarks

format: .venv/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/black --quiet $(SOURCES)

# The learning curves under benchmarks/results: three seeds, one thread each, two at a time
EVIDENCE := --no-progress --threads 1 --eval-envs 10
evidence: .venv/.installed
	mkdir -p logs benchmarks/results
	printf '%s\n' 0 1 2 | xargs -P 2 -I{} $(BIN)/python scripts/train.py $(EVIDENCE) --seed {} \
		--env InvertedPendulum-v5 --steps 10000 --eval-freq 2500 --csv benchmarks/results/inverted-pendulum.csv
	printf '%s\n' 0 1 2 | xargs -P 2 -I{} $(BIN)/python scripts/train.py $(EVIDENCE) --seed {} \
		--env dm_control/cartpole-swingup-v0 --steps 50000 --eval-freq 10000 --csv benchmarks/results/cartpole-swingup.csv

clean:
	rm -rf .venv logs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
