# Needs Python 3.11 or 3.12, make and a C compiler; everything else is put into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := quickstart
PYTEST_ARGS ?=
# Each holds TensorFlow: some 3 GB. In the order of their folders; else files of few tests, which
# are whole jobs, are left for the end.
PYTEST_PROCESSES ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# For test-engines: those of deploy/engines, with commas.
ENGINES ?= all
# For chaos.
SEED ?= 0
KILLS ?= 100
INPUTS ?= 1000
# Its engine: flink_cluster, which needs Java, Maven and Go, or prism, which needs Go.
ENGINE ?= flink_cluster
ENGINE_KILLS ?= 10
# Of an engine that is started to be tried.
WORKERS ?= 2

# TensorFlow's notes on its own start-up say nothing about a run.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-engines chaos engines lint documents format clean
.PHONY: prism flink flink-cluster spark job-service

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with this package, editable, and all that it needs

$(INSTALLED): setup.py pyproject.toml tracin_beam/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --editable '.[test,examples]'
	@touch $@

quickstart: $(QUICKSTART)/.trained  ## handwritten digits from training to a report, about two minutes
	$(BIN)/python -m pipelines.influence --task examples/digits/task.py:task \
	  --checkpoints $(QUICKSTART)/ckpts --train '$(QUICKSTART)/data/train-*.tfrecord' \
	  --test '$(QUICKSTART)/data/test-*.tfrecord' --output $(QUICKSTART)/out --top_k 10
	$(BIN)/python -m pipelines.self_influence --task examples/digits/task.py:task \
	  --checkpoints $(QUICKSTART)/ckpts --train '$(QUICKSTART)/data/train-*.tfrecord' \
	  --output $(QUICKSTART)/out
	$(BIN)/python examples/digits/summary.py --output $(QUICKSTART)

# Trained once: a second `make quickstart` finds its embeddings made and only writes the tables again.
$(QUICKSTART)/.trained: examples/digits/task.py examples/digits/train.py | $(INSTALLED)
	rm -rf $(addprefix $(QUICKSTART)/,data ckpts out)
	$(BIN)/python examples/digits/train.py --output $(QUICKSTART)
	@touch $@

test: $(INSTALLED)  ## run the tests; PYTEST_ARGS='-k report' chooses some
	$(BIN)/python -m pytest $(PYTEST_PROCESSES) $(PYTEST_ARGS)

test-engines: $(INSTALLED)  ## the same job on Prism, Flink and Spark; ENGINES=prism,flink chooses
	$(BIN)/python -m pytest tests/engines --engines=$(ENGINES) $(PYTEST_PROCESSES) $(PYTEST_ARGS)

chaos: $(INSTALLED)  ## kill runs, damage their output and mutate their input; SEED=0 KILLS=100 INPUTS=1000 ENGINE=prism
	$(BIN)/python tests/chaos/chaos.py --seed=$(SEED) --kills=$(KILLS) --inputs=$(INPUTS) \
	  --engine=$(ENGINE) --engine_kills=$(ENGINE_KILLS)

engines: $(INSTALLED)  ## fetch all engines; needs Go, Java and Maven, see deploy/engines
	$(BIN)/python deploy/engines/fetch.py

prism: $(INSTALLED)  ## start Prism, and show the flags to run on it; WORKERS=2
	$(BIN)/python deploy/engines/engines.py prism --workers $(WORKERS)

flink: $(INSTALLED)  ## start an embedded Flink
	$(BIN)/python deploy/engines/engines.py flink --workers $(WORKERS)

flink-cluster: $(INSTALLED)  ## start a Flink cluster whose workers are processes
	$(BIN)/python deploy/engines/engines.py flink_cluster --workers $(WORKERS)

spark: $(INSTALLED)  ## start an embedded Spark
	$(BIN)/python deploy/engines/engines.py spark --workers $(WORKERS)

job-service: $(INSTALLED)  ## start Beam's own job service, whose workers are processes
	$(BIN)/python deploy/engines/engines.py job_service --workers $(WORKERS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tracin_beam pipelines

documents: $(INSTALLED)  ## write what is made from the flags: docs/flags.md, the Flex Template's parameters
	$(BIN)/python deploy/documents.py

format: $(INSTALLED)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, the quickstart's output and all caches
	rm -rf $(VENV) $(QUICKSTART) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
