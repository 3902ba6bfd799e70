# Everything runs in .venv, made from the locked requirements. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash
export OMP_NUM_THREADS ?= 1

.PHONY: help demo bench performance test test-slow test-safety test-container test-soak test-threats test-gpu bench-vllm test-vllm test-scrape test-dynamo metrics-page audit sbom screenshots lint types check format proto proto-environment lock models results clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.stamp-run: requirements/run.lock pyproject.toml
	@echo "setting up .venv (once)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11 to 3.13 is needed; say which: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

.stamp-dev: .stamp-run requirements/dev.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	@touch $@

.stamp-proto: requirements/proto.lock
	@$(PYTHON) -m venv .venv-proto
	@.venv-proto/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/proto.lock
	@touch $@

demo: .stamp-run  ## ten minutes of a real trace on one simulated GPU, at maximum clock and throttled
	$(BIN)/throttle demo --out out/demo

test: .stamp-dev .stamp-proto  ## unit, property and integration tests
	$(BIN)/pytest -m "not slow and not container and not engine"

test-slow: .stamp-dev  ## the tests that take long
	$(BIN)/pytest -m slow

test-container: .stamp-dev  ## build the image without a Docker engine, run it, print its size (root, buildah, debootstrap)
	$(BIN)/pytest -m container -rs -s --timeout 3600 tests/container

test-soak: .stamp-dev  ## 32 simulated engines that connect, crash and return, for SOAK_MINUTES (30)
	$(BIN)/python scripts/soak.py --minutes $${SOAK_MINUTES:-30} --iterations-per-second $${SOAK_ITERATIONS_PER_SECOND:-50} --out out/soak

test-threats: .stamp-dev  ## remove each defence of docs/security.md in a copy; its test must fail
	$(BIN)/python scripts/check_threats.py

test-gpu: .stamp-dev  ## what is read of a GPU: a real one where there is one, and the fakes; sets nothing
	$(BIN)/pytest tests/gpu

test-safety: .stamp-dev  ## crash matrix, 10,000 random sequences, five minutes of noise at each door (at most 30 minutes)
	TEST_SAFETY=1 timeout --signal INT --kill-after 60 1740 $(BIN)/pytest tests/safety

# Real engines, each in an environment of its own that is made once. Big downloads: the tests skip
# and say why where one is not possible.
.stamp-vllm: scripts/engine_environments.sh
	scripts/engine_environments.sh vllm "$(PYTHON)" && touch $@

.stamp-dynamo: scripts/engine_environments.sh
	scripts/engine_environments.sh dynamo "$(PYTHON)" && touch $@

test-vllm: .stamp-dev  ## a real vLLM on the CPU with both adapters (3 GB of downloads, a quarter of an hour)
	-@$(MAKE) --no-print-directory .stamp-vllm
	$(BIN)/pytest -m engine tests/engines/real/test_vllm.py tests/engines/real/test_environment.py -raP

bench-vllm: .stamp-dev .stamp-vllm  ## what the adapters cost a real vLLM on the CPU, in paired runs (half an hour)
	for adapter in stat_logger scheduler; do $(BIN)/python -m tests.engines.real.compare_throughput --adapter $$adapter || exit 1; done

test-scrape: .stamp-dev  ## the /metrics of a real vLLM into the scrape bridge
	-@$(MAKE) --no-print-directory .stamp-vllm
	$(BIN)/pytest -m engine tests/engines/real/test_scrape.py -raP

test-dynamo: .stamp-dev  ## the real Dynamo mocker into the ForwardPassMetrics bridge
	-@$(MAKE) --no-print-directory .stamp-dynamo
	$(BIN)/pytest -m engine tests/engines/real/test_dynamo.py -raP

lint: .stamp-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .stamp-dev  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## what CI runs

format: .stamp-dev  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto-environment: .stamp-proto  ## the locked stub generator, in an environment of its own

proto: .stamp-proto  ## write the stubs in throttle/v1 from proto/
	.venv-proto/bin/python scripts/generate_protos.py

metrics-page: .stamp-dev  ## write docs/metrics.md from the metrics
	$(BIN)/python scripts/metrics_page.py

.stamp-audit: requirements/audit.lock
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/audit.lock
	@touch $@

audit: .stamp-audit  ## ask the advisory database about everything that is installed
	for lock in image run dev; do .venv-audit/bin/pip-audit --strict --disable-pip --no-deps --require-hashes -r requirements/$$lock.lock || exit 1; done

sbom: .stamp-audit  ## what the image installs, as a CycloneDX bill of materials in out/sbom.json
	@mkdir -p out
	.venv-audit/bin/cyclonedx-py requirements requirements/image.lock --pyproject pyproject.toml --output-reproducible --output-format JSON --output-file out/sbom.json

screenshots: .stamp-run  ## take the pictures of docs/images from running programs (chromium, prometheus)
	$(BIN)/python scripts/screenshots.py

lock:  ## resolve and hash the dependencies anew (needs uv)
	scripts/lock.sh --upgrade

PLANTS := h200-qwen3-30b-a3b h100-qwen3-30b-a3b h200-gpt-oss-120b h200-deepseek-v3-ep8 \
  h100-mixtral-8x7b-tp2 h100-qwen3-235b-a22b-ep8 a100-mixtral-8x7b-tp4 b200-qwen3-235b-a22b-ep4 \
  h100-llama-3.1-8b

models: $(PLANTS:%=model-%) model-generic  ## profile the simulated GPUs and train every shipped bundle

# recordings of other plants or of another way to profile would be taken for finished rounds
model-generic: .stamp-run
	rm -rf out/generic
	$(BIN)/python scripts/record_generic.py --out out/generic --minutes 3 --draws 0
	$(BIN)/throttle-predictors train --generic --data out/generic --out models

model-%: .stamp-run
	rm -rf out/profiles/$*
	$(BIN)/throttle profile --plant $* --minutes 20 --out out/profiles/$*
	$(BIN)/throttle-predictors train --data out/profiles/$* --out models

results: .stamp-run  ## play what is missing of docs/results.md and write its tables (long; resumable)
	$(BIN)/python scripts/results.py --bundles models

bench: .stamp-run  ## fail if a decision has become slower, measured in a fixed computation
	$(BIN)/throttle bench guard --samples 1000

performance: .stamp-run  ## measure what a decision costs on this machine and write docs/performance.md (minutes)
	$(BIN)/python scripts/performance_page.py

clean:  ## remove what make made
	rm -rf .venv .venv-proto .stamp-* out .mypy_cache .ruff_cache .hypothesis build dist
