# make train | test | lint: each sets up what it needs first; a second call starts working within seconds.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN_ARGS ?=

.PHONY: help setup train observe generate test test-unit test-gpu chaos soak lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make train   fully-async demo run of a tiny MoE on this machine (TRAIN_ARGS='--key value ...')"
	@echo "make observe Prometheus and Grafana on all runs in runs/, those to come as well"
	@echo "make test    lint, types and every test that CI runs"
	@echo "make test-gpu  what only GPUs can show; skipped where there are too few"
	@echo "make chaos   kills of every process in every phase, and a thousand replicas in virtual time (22 minutes)"
	@echo "make soak    half an hour of pushes and kills, with the memory of every process watched"
	@echo "make lint    ruff and mypy alone"
	@echo "make generate  what is written from code: docs/reference/metrics.md, the dashboards"
	@echo "make bench   the benchmarks; each prints one JSON line last"

setup: $(STAMP)

# The lock lists every package, so pip resolves nothing (see the head of requirements/cpu.txt for why).
$(STAMP): requirements/cpu.txt requirements/ray-metrics.txt pyproject.toml launch/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash launch/setup.sh
	@touch $@

train: $(STAMP)
	launch/fully_async.sh configs/tiny_moe.yaml $(TRAIN_ARGS)

observe: $(STAMP)
	$(BIN)/async-rl observe runs

generate: $(STAMP)
	$(BIN)/python -m async_rl.metrics.reference > docs/reference/metrics.md
	$(BIN)/python -m async_rl.config.reference > docs/reference/settings.md
	$(BIN)/python dashboards/build.py

test: lint
	$(BIN)/python -m pytest -m "not long" --durations=30 tests/unit tests/integration tests/chaos tests/gpu

test-unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

chaos: $(STAMP)
	$(BIN)/python -m pytest -s tests/chaos

soak: $(STAMP)
	$(BIN)/python -m tests.chaos.soak

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m tests.bench.codec
	$(BIN)/python -m tests.bench.message_queue
	$(BIN)/python -m tests.bench.budget
	$(BIN)/python -m tests.bench.staleness
	$(BIN)/python -m tests.bench.recovery
	$(BIN)/python -m tests.bench.overlap
	$(BIN)/python -m tests.bench.policies
	$(BIN)/python -m tests.bench.replay
	$(BIN)/python -m tests.bench.mismatch
	$(BIN)/python -m tests.bench.trainer
	$(BIN)/python -m tests.bench.metrics

clean:
	rm -rf $(VENV) .cache build *.egg-info
