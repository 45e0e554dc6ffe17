# One environment (.venv), one entry for every task. Each target sets the environment up when it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup hooks quickstart protocol interference study methods real transfer pictures test test-all
.PHONY: test-distributed test-te test-bridge test-fairseq2 test-transformers5 test-gpu test-gpus gpu-packages
.PHONY: lint format clean clean-venv

# Two pytest workers with one thread each: more threads than cores slow torch down several times.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 --durations 15
WORKERS ?= 2
GPU_JOBS ?= 4
N ?= 2

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup:  ## make .venv (Python 3.12, pinned packages) when it is missing or out of date
	@tools/setup_environment.sh

hooks: setup  ## install the pre-commit hooks
	@.venv/bin/pre-commit install

quickstart: setup  ## the whole path on a laptop; MINUTES=2 shortens it, OUT=DIR chooses the folder
	@bash examples/quickstart/run.sh

protocol: setup  ## the paper's protocol, scaled down: seven languages, 14 directions; MINUTES and OUT as above
	@bash examples/protocol/run.sh

interference: setup  ## Mix-MoE beside full fine-tuning on the same text; PAIR, MINUTES, BASE and OUT
	@bash examples/interference/run.sh

study: setup  ## the paper's tables with a verdict; TABLE, SEEDS, MINUTES, PAIRS, SIZE, BASE, RATES, DRY, OUT
	@bash examples/study/run.sh

methods: setup  ## every method on one base: start, some steps, export, reload; METHODS, STEPS, PAIR, BASE and OUT
	@bash examples/methods/run.sh

real: setup  ## a pretrained base: zero-shot, upcycled, stage 1, Mix-MoE, full fine-tuning; PAIR, BASE, HOURS, OUT
	@bash examples/real/run.sh

transfer: setup  ## what training on one pair gains in the others; PAIRS, FROM (a protocol's OUT), MINUTES and OUT
	@bash examples/transfer/run.sh

pictures: setup  ## draw the two pictures of the top README, the results from the tables of the examples' papers
	@PYTHONPATH=. .venv/bin/python examples/pictures/draw.py

test: setup  ## the tests without the slow ones
	@$(PYTEST) -m "not slow"

test-all: setup  ## all tests
	@$(PYTEST)

test-distributed: setup  ## the tests of several processes, the slow ones too: N processes equal one, resharding, kills
	@$(PYTEST) tests/distributed

test-transformers5: setup  ## all but COMET on NumPy 2 and transformers 5.x, in .venv-transformers5 (made when missing)
	@tools/test_transformers5.sh

test-te: setup  ## structure tests of the Transformer Engine path, in .venv-te (built when missing); no GPU
	@tools/setup_te_environment.sh
	@CUDA_HOME=$(CURDIR)/.venv-te/include OMP_NUM_THREADS=1 .venv-te/bin/python -m pytest --require-te tests/te

test-bridge: setup  ## Megatron-Bridge on exported models, in .venv-bridge (made, with .venv-te, when missing); no GPU
	@tools/setup_te_environment.sh
	@tools/test_bridge.sh

test-fairseq2: setup  ## Mix-MoE as a model family of fairseq2, in .venv-fairseq2 (made when missing); no GPU
	@tools/test_fairseq2.sh

test-gpu: setup  ## one GPU, ten minutes: what needs CUDA, row by row, runs/gpu_report.json; DEVICE=cpu without one
	@.venv/bin/python -m tests.gpu.run --jobs $(GPU_JOBS)

test-gpus: setup  ## N processes equal one on NCCL: N=2 GPUs
	@DEVICE=cuda GPUS=$(N) .venv/bin/pytest tests/distributed/test_n_equals_one.py --durations 15

gpu-packages:  ## what `python -m tests.gpu.run` needs on a machine that has only torch and transformers
	@cat tests/gpu/packages.txt

lint: setup  ## ruff, format check, mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup  ## rewrite the sources in the common format
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## remove caches and build output
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

clean-venv: clean  ## remove the environment too
	@rm -rf .venv .venv-te .venv-bridge .venv-fairseq2 .venv-transformers5*
