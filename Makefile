# make train | check | test | test-all: each sets up what it needs first; a second call starts working within seconds.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What the environment is for: as it was made, else cuda where there is a GPU.
DEVICE ?= $(or $(shell cat $(VENV)/device 2>/dev/null),$(if $(wildcard $(VENV)/.installed),cpu),$(if $(shell nvidia-smi --list-gpus 2>/dev/null),cuda,cpu))
LOCK := requirements/$(if $(filter cuda,$(DEVICE)),gpu,cpu).txt
STAMP := $(VENV)/.installed-$(DEVICE)
CHAT_STAMP := $(VENV)/.chat-installed
# On GPUs SGLang has an environment of its own, for rollout.sglang.python.
SGLANG_VENV := $(VENV)-sglang
SGLANG_STAMP := $(if $(filter cuda,$(DEVICE)),$(SGLANG_VENV)/.installed,$(VENV)/.sglang-installed)
# What environments import: the Python of rollout.agent.python in the tests and examples.
ENVIRONMENTS_VENV := $(VENV)-environments
ENVIRONMENTS_STAMP := $(ENVIRONMENTS_VENV)/.installed
# The libraries verifiers and OpenEnv, for their tests alone: they are large, and go together with nothing else.
VERIFIERS_VENV := $(VENV)-verifiers
VERIFIERS_STAMP := $(VERIFIERS_VENV)/.installed
# verifiers 0.4, which has other environments than 0.3.
VERIFIERS_V1_VENV := $(VENV)-verifiers-v1
VERIFIERS_V1_STAMP := $(VERIFIERS_V1_VENV)/.installed
ENGINE ?= vllm
TRAIN_ARGS ?=

.PHONY: help setup environments verifiers train train-chat observe generate lint check test test-all test-unit test-gpu smoke chaos soak bench clean
.DEFAULT_GOAL := help

help:
	@echo "make train   fully-async demo run of a tiny MoE on this machine (TRAIN_ARGS='--key value ...')"
	@echo "make setup DEVICE=cuda  an environment for NVIDIA GPUs; without DEVICE, where nvidia-smi finds one"
	@echo "make setup ENGINE=sglang  what rollout.engine sglang needs beside the rest; on GPUs in $(SGLANG_VENV)"
	@echo "make environments  libraries of environments (reasoning-gym), in $(ENVIRONMENTS_VENV)"
	@echo "make verifiers  the libraries verifiers 0.3 and OpenEnv (600 MB), in $(VERIFIERS_VENV), and verifiers 0.4, in $(VERIFIERS_V1_VENV)"
	@echo "make train-chat  a pretrained chat model that learns to follow an instruction (half an hour on two cores)"
	@echo "make observe Prometheus and Grafana on all runs in runs/, those to come as well"
	@echo "make check   lint, types and unit tests (4 minutes on two cores)"
	@echo "make test    check, and the integration tests that CI runs (12 minutes)"
	@echo "make test-all  every test there is, chaos included (two hours; PART=1/2 runs half of the files, 2/2 the rest)"
	@echo "make smoke   the real queue, driver and trainer around a scripted engine, with one kill (a minute)"
	@echo "make test-gpu  what only GPUs can show; skipped where there are too few"
	@echo "make chaos   kills of every process in every phase, and a thousand replicas in virtual time (22 minutes)"
	@echo "make soak    half an hour of pushes and kills, with the memory of every process watched"
	@echo "make lint    ruff, mypy, the borders between the rooms, and plain prose"
	@echo "make generate  what is written from code: metrics and settings in docs/reference, the dashboards"
	@echo "make bench   the benchmarks; each prints one JSON line last"

setup: $(STAMP) $(if $(filter sglang,$(ENGINE)),$(SGLANG_STAMP))

# The lock lists every package, so pip resolves nothing (see the head of requirements/cpu.txt for why).
$(STAMP): $(LOCK) requirements/ray-metrics.txt pyproject.toml launch/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) DEVICE=$(DEVICE) bash launch/setup.sh
	@touch $@

$(VENV)/.sglang-installed: requirements/sglang.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/sglang.txt
	@touch $@

$(SGLANG_VENV)/.installed: requirements/sglang-gpu.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/sglang-gpu.txt
	@touch $@

$(ENVIRONMENTS_STAMP): requirements/environments.txt
	$(PYTHON) -m venv $(ENVIRONMENTS_VENV)
	$(ENVIRONMENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/environments.txt
	@touch $@

environments: $(ENVIRONMENTS_STAMP)

$(VERIFIERS_STAMP): requirements/verifiers.txt
	$(PYTHON) -m venv $(VERIFIERS_VENV)
	$(VERIFIERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/verifiers.txt
	@touch $@

$(VERIFIERS_V1_STAMP): requirements/verifiers-v1.txt
	$(PYTHON) -m venv $(VERIFIERS_V1_VENV)
	$(VERIFIERS_V1_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/verifiers-v1.txt
	@touch $@

verifiers: $(VERIFIERS_STAMP) $(VERIFIERS_V1_STAMP)

train: $(STAMP)
	launch/fully_async.sh configs/tiny_moe.yaml $(TRAIN_ARGS)

$(CHAT_STAMP): requirements/chat.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/chat.txt
	@touch $@

train-chat: $(CHAT_STAMP)
	launch/fully_async.sh configs/chat_moe.yaml $(TRAIN_ARGS)

observe: $(STAMP)
	$(BIN)/async-rl observe runs

generate: $(STAMP)
	$(BIN)/python -m async_rl.metrics.reference > docs/reference/metrics.md
	$(BIN)/python -m async_rl.config.reference > docs/reference/settings.md
	$(BIN)/python dashboards/build.py

# What each tier runs, and within which time, is in tests/support/tiers.py.
lint check: $(STAMP)
	$(BIN)/python -m tests.support.tiers $@

# The tests of SGLang and of environments' libraries run where these are installed.
test test-all: $(if $(filter cpu,$(DEVICE)),$(SGLANG_STAMP),$(STAMP)) $(ENVIRONMENTS_STAMP)
	$(BIN)/python -m tests.support.tiers $@ $(PART)

# As do those of verifiers and OpenEnv, which are large.
test-all: $(VERIFIERS_STAMP) $(VERIFIERS_V1_STAMP)

smoke: $(STAMP)
	$(BIN)/python -m pytest -q tests/integration/test_smoke.py

test-unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

chaos: $(STAMP)
	$(BIN)/python -m pytest -s tests/chaos

soak: $(STAMP)
	$(BIN)/python -m tests.chaos.soak

bench: $(STAMP)
	$(BIN)/python -m tests.bench.codec
	$(BIN)/python -m tests.bench.message_queue
	$(BIN)/python -m tests.bench.budget
	$(BIN)/python -m tests.bench.staleness
	$(BIN)/python -m tests.bench.recovery
	$(BIN)/python -m tests.bench.overlap
	$(BIN)/python -m tests.bench.pause
	$(BIN)/python -m tests.bench.policies
	$(BIN)/python -m tests.bench.replay
	$(BIN)/python -m tests.bench.mismatch
	$(BIN)/python -m tests.bench.trainer
	$(BIN)/python -m tests.bench.metrics
	$(BIN)/python -m tests.bench.cluster --payloads
	$(BIN)/python -m tests.bench.joining
	$(BIN)/python -m tests.bench.hosts_at_scale
	$(BIN)/python -m tests.bench.gateway
	$(BIN)/python -m tests.bench.scale
	$(BIN)/python -m tests.bench.push
	$(BIN)/python -m tests.bench.dataset
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.trainer_memory
	$(BIN)/python -m tests.bench.run_memory

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(ENVIRONMENTS_VENV) $(VERIFIERS_VENV) $(VERIFIERS_V1_VENV) .cache build *.egg-info
