# `make train` and `make test` do all the set-up themselves, once.
PYTHON ?= python3
BIN := .venv/bin
ENV ?= Pendulum-v1
SEED ?= 0
SOURCES := sb3_boom tests scripts benchmarks examples docs/conf.py docs/check_site.py

.PHONY: train test slow lint type docs format evidence evidence-settings evidence-terminations evidence-acting evidence-gym evidence-dmc evidence-others gpu clean

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,ray]"
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
	$(BIN)/mypy sb3_boom scripts examples

# The site: docs/_build/html/index.html. Needs no network; a warning or a link that leads nowhere is an error
docs: .venv/.installed
	rm -rf docs/_build  # pages of sources are not made anew otherwise
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html

format: .venv/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/black --quiet $(SOURCES)

# The learning curves under benchmarks/results, made anew: three seeds, one thread each, two at a time. Goes on where it stopped.
# Those of Gymnasium's tasks are of the authors' program's alignment.
EVIDENCE := logs/evidence
define curves
	printf '%s\n' 0 1 2 | xargs -P 2 -I{} $(BIN)/python scripts/train.py --no-progress --threads 1 --eval-envs 10 \
		--seed {} --csv $(EVIDENCE)/$(1).csv $(2)
endef
RELEASE := -params "alignment:'release'" tau:0.05 "planner_kwargs:dict(horizon_value='mean')"
PIXELS := --env InvertedPendulum-v5 --hyperparams zoo_hyperparams/boom-pixels.yml
GRID := --cpu --seeds 0 1 2 --jobs 2 --folder $(EVIDENCE)
ABLATED := dm_control/cheetah-run-v0 dm_control/finger-spin-v0
evidence: evidence-dmc
	mkdir -p $(EVIDENCE)
	$(call curves,inverted-pendulum,--env InvertedPendulum-v5 --steps 10000 --eval-freq 2500 $(RELEASE))
	$(call curves,inverted-pendulum,--env InvertedPendulum-v5 --steps 12000 --eval-freq 4000 $(RELEASE) n_envs:4 gradient_steps:-1)
	$(call curves,inverted-double-pendulum,--env InvertedDoublePendulum-v5 --eval-freq 10000 $(RELEASE))
	$(call curves,inverted-pendulum-pixels,$(PIXELS) --eval-freq 2000 $(RELEASE))
	$(call curves,inverted-pendulum-pixels,$(PIXELS) --random)
	$(call curves,hopper,--env Hopper-v5 --eval-freq 10000 $(RELEASE))
	$(call curves,hopper,--env Hopper-v5 --eval-freq 10000 $(RELEASE) handle_terminations:False)
	$(BIN)/sb3-boom benchmark run --suite dmc6 --variants release --steps 50000 --csv $(EVIDENCE)/ablation.csv $(GRID)
	$(BIN)/sb3-boom benchmark run --tasks $(ABLATED) --variants reverse_kl none uniform no_warmup coef_A/1000 --steps 20000 \
		--csv $(EVIDENCE)/ablation.csv $(GRID)
	$(BIN)/sb3-boom benchmark report $(EVIDENCE)/dmc6.csv $(EVIDENCE)/ablation.csv --tasks $(ABLATED) --until 20000 \
		--out $(EVIDENCE)/ablation.md

# What a step costs on a GPU, and whether CUDA graphs change a number: OUT/gpu.json, in five minutes. Takes the Python that has
# torch with CUDA, and what else the package needs, as it is
OUT ?= logs/gpu
GPU_SECONDS ?= 300
gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py --out $(OUT) --seconds $(GPU_SECONDS)

# Those of benchmarks/protocol.md, three seeds each; JOBS runs side by side. They go on where they stopped.
JOBS ?= 2
PROTOCOL := --cpu --seeds 0 1 2 --jobs $(JOBS)
define pages
	$(BIN)/sb3-boom benchmark report $(EVIDENCE)/$(1).csv --out $(EVIDENCE)/$(1).md
	$(BIN)/sb3-boom benchmark export $(EVIDENCE)/$(1).csv --out $(EVIDENCE)/$(1)-long.csv
endef
CANDIDATES := forward_kl by_q_scale align_scale_2 align_scale_20 max_std_0.5 min_value mean_value two_updates
# Settings against each other, on the development tasks
evidence-settings: .venv/.installed
	$(BIN)/sb3-boom benchmark run --suite development --variants $(CANDIDATES) --steps 30000 --eval-freq 5000 \
		--csv $(EVIDENCE)/settings.csv --folder $(EVIDENCE)/settings $(PROTOCOL)
	$(call pages,settings)
# The changes to the termination head, each alone
evidence-terminations: .venv/.installed
	$(BIN)/python benchmarks/terminations.py --csv $(EVIDENCE)/terminations.csv --jobs $(JOBS)
# Ways to act deterministically, on models of the settings' grid
ACTING := Hopper-v5 dm_control/finger-spin-v0 dm_control/cheetah-run-v0 dm_control/reacher-easy-v0
evidence-acting: .venv/.installed
	$(BIN)/sb3-boom benchmark run --tasks $(ACTING) --variants forward_kl --steps 30000 --eval-freq 5000 \
		--csv $(EVIDENCE)/settings.csv --folder $(EVIDENCE)/settings $(PROTOCOL)
	$(BIN)/python benchmarks/acting.py --tasks $(ACTING) --variants forward_kl --folder $(EVIDENCE)/settings \
		--csv $(EVIDENCE)/acting.csv
evidence-gym: .venv/.installed
	$(BIN)/sb3-boom benchmark run --suite gym5 --variants forward_kl --steps 100000 \
		--csv $(EVIDENCE)/gym5.csv --folder $(EVIDENCE)/gym5 $(PROTOCOL)
	$(call pages,gym5)
evidence-dmc: .venv/.installed
	$(BIN)/sb3-boom benchmark run --suite dmc6 --variants forward_kl --steps 50000 --eval-freq 5000 \
		--csv $(EVIDENCE)/dmc6.csv --folder $(EVIDENCE)/dmc6 $(PROTOCOL)
	$(call pages,dmc6)
# BOOM beside SAC, TQC and CrossQ, against env steps and against minutes
OTHERS := --variants forward_kl SAC TQC CrossQ --steps 50000 --csv $(EVIDENCE)/others.csv --folder $(EVIDENCE)/others
evidence-others: .venv/.installed
	$(BIN)/sb3-boom benchmark run --tasks Hopper-v5 HalfCheetah-v5 Walker2d-v5 $(OTHERS) $(PROTOCOL)
	$(BIN)/sb3-boom benchmark run --tasks dm_control/cartpole-swingup-v0 dm_control/cheetah-run-v0 $(OTHERS) --eval-freq 5000 $(PROTOCOL)
	$(call pages,others)

clean:
	rm -rf .venv logs docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
