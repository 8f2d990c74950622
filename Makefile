# Commands for developers. Each target first installs what it needs into .venv, once.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAKEFLAGS += --jobs=3  # environments are set up side by side
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := -c constraints.txt
GENERATORS := .venv-generators
INFERENCE := .venv-inference
DEPLOY := .venv-deploy
LOWEST := .venv-lowest
SUPPLY := .venv-supply
BROWSER := .venv-browser
CHECKOV := .venv-checkov

.PHONY: help run test coverage test-quick test-lowest sync-client check demo bench bench-quick bench-gpu example-digits examples pictures soak soak-crashes soak-followers alerts simulate mutants machines schemathesis fuzz fuzz-keep lock sbom licences dist image image-check checkov clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

run: $(VENV)/service.stamp ## start the service on 127.0.0.1:8000
	@exec $(BIN)/batchnorm-service serve $(ARGS)

test: check $(GENERATORS)/generators.stamp $(INFERENCE)/clients.stamp $(BROWSER)/browser.stamp $(DEPLOY)/tools.stamp ## lint, types, dependency rules, and every test
	@$(BIN)/python -m compileall -q client service # hundreds of tests start processes, which may be told to write no bytecode
	$(BIN)/pytest --numprocesses 3 --dist worksteal $(ARGS)

coverage: $(VENV)/dev.stamp ## every test, and which lines none reaches (it takes half as long again)
	$(BIN)/pytest --numprocesses 3 --dist worksteal --cov --cov-report term-missing $(ARGS)

test-quick: check ## the same in a minute: only the tests that start no processes and do not wait
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m "not slow" $(ARGS)

sync-client: $(VENV)/dev.stamp ## generate the synchronous client from the asynchronous one
	$(BIN)/python client/generate_sync.py

check: $(VENV)/dev.stamp ## lint, types, dependency rules and the generated client only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=client:service $(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python client/generate_sync.py --check

demo: $(VENV)/dev.stamp ## normalize the digits images with a real server, and compare with torch
	$(BIN)/python examples/digits.py

bench: .venv-bench/bench.stamp ## measure every row of benchmarks/README.md, other servers too (under 15 minutes)
	@.venv-bench/bin/python -m benchmarks $(ARGS)

bench-quick: .venv-bench/bench.stamp ## the same without other servers, in two minutes: run it before and after a change
	@.venv-bench/bin/python -m benchmarks --quick $(ARGS)

bench-gpu: .venv-bench/bench.stamp ## the engine on a CUDA device, compared with torch's module and with copying
	@.venv-bench/bin/python -m benchmarks.gpu

example-digits: $(VENV)/dev.stamp ## train two nets on digits with remote layers, and compare with torch
	$(BIN)/python examples/digits_training.py

examples: $(VENV)/dev.stamp ## run the examples of docs/sharing.md
	$(BIN)/python examples/federated.py
	$(BIN)/python examples/reinforcement.py
	$(BIN)/python examples/synchronized.py

pictures: $(VENV)/dev.stamp ## run all examples, and redraw the pictures in docs/
	$(BIN)/python examples/digits_training.py --plot docs/digits_training.png
	$(BIN)/python examples/federated.py --plot docs/federated.png
	$(BIN)/python examples/reinforcement.py --plot docs/reinforcement.png
	$(BIN)/python examples/synchronized.py --plot docs/synchronized.png
	$(BIN)/python examples/page.py --plot docs/page.png

# The locks have the versions of constraints.txt with hashes of everything but torch, whose hash depends on the build.
# PIP_EXTRA_INDEX_URL selects the CPU build: see README.md.
$(VENV)/service.stamp: pyproject.toml constraints.txt requirements/service.txt
	@echo "Setting up $(VENV) (once) ..."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --require-hashes --no-deps --requirement requirements/service.txt
	@$(PIP) install $(CONSTRAINTS) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/service.stamp requirements/dev.txt
	@echo "Setting up what the tests need (once) ..."
	@$(PIP) install --require-hashes --no-deps --requirement requirements/dev.txt
	@touch $@

# The client generators that tests/generators runs. Without npm the TypeScript test is skipped.
$(GENERATORS)/generators.stamp: tests/generators/requirements.txt tests/generators/package-lock.json
	@echo "Setting up $(GENERATORS) (once) ..."
	@$(PYTHON) -m venv --clear $(GENERATORS)
	@$(GENERATORS)/bin/python -m pip --disable-pip-version-check --quiet install -r tests/generators/requirements.txt
	@cp tests/generators/package.json tests/generators/package-lock.json $(GENERATORS)
	@if command -v npm > /dev/null; then npm ci --prefix $(GENERATORS) --silent --no-audit --no-fund; fi
	@touch $@

# The clients of the Open Inference Protocol that tests/open_inference/clients runs.
$(INFERENCE)/clients.stamp: tests/open_inference/clients/requirements.txt
	@echo "Setting up $(INFERENCE) (once) ..."
	@$(PYTHON) -m venv --clear $(INFERENCE)
	@$(INFERENCE)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-compile -r $<
	@touch $@

# What tests/ui/test_browser.py needs: axe-core, and Chromium from Debian's packages if there is none and this is root. Its
# tests are skipped, and say why, where one of them cannot be had.
$(BROWSER)/browser.stamp: tests/ui/package-lock.json
	@echo "Setting up $(BROWSER) (once) ..."
	@mkdir -p $(BROWSER)
	@cp tests/ui/package.json tests/ui/package-lock.json $(BROWSER)
	@if command -v npm > /dev/null; then npm ci --prefix $(BROWSER) --silent --no-audit --no-fund; fi
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null \
		&& [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } > /dev/null \
		|| echo "Chromium could not be installed: the tests of the page in a browser will be skipped."; fi
	@touch $@

# What tests/deploy reads the files of deploy/ with, and nginx from Debian's packages if there is none and this is root. One
# apt-get after the other: each locks the list of packages.
$(DEPLOY)/tools.stamp: tests/deploy/requirements.txt | $(BROWSER)/browser.stamp
	@echo "Setting up $(DEPLOY) (once) ..."
	@$(PYTHON) -m venv --clear $(DEPLOY)
	@$(DEPLOY)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-compile -r $<
	@if ! PATH=$$PATH:/usr/sbin command -v nginx > /dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends nginx-light; } > /dev/null \
		|| echo "nginx could not be installed: the tests of deploy/nginx.conf will be skipped."; fi
	@touch $@

test-lowest: $(LOWEST)/lowest.stamp ## the tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

$(LOWEST)/lowest.stamp: pyproject.toml tests/install/lowest.py
	@echo "Setting up $(LOWEST) (once) ..."
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(PYTHON) tests/install/lowest.py > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check --quiet install -c $(LOWEST)/lowest.txt --editable '.[service,otel,torch,demo,dev]'
	@touch $@

soak: MINUTES = 30
soak: $(VENV)/dev.stamp ## mixed load for MINUTES=30: memory, file descriptors, and every fold
	@PYTHONPATH=tests $(BIN)/python -m soak.run --minutes $(MINUTES)

soak-crashes: $(VENV)/dev.stamp ## 2,000 train calls against workers and replicas that are killed and restarted
	BATCHNORM_TEST_CALLS=2000 $(BIN)/pytest tests/service/test_workers.py $(ARGS)

soak-followers: $(VENV)/dev.stamp ## 50 followers of one layer while the service and half of them are killed
	BATCHNORM_TEST_FOLLOWERS=50 $(BIN)/pytest tests/service/test_follower_crashes.py $(ARGS)

alerts: $(VENV)/dev.stamp ## provoke every alert of deploy/ with real services and a real Prometheus, PROMETHEUS=its path
	@PYTHONPATH=tests PROMETHEUS=$(PROMETHEUS) $(BIN)/python -m alerts.run

SEEDS := 1000
FIRST := 0
SIMULATION = PYTHONPATH=tests $(BIN)/python -m simulation.run

simulate: $(VENV)/dev.stamp ## run SEEDS simulated worlds from FIRST on, or replay one and shorten it: SEED=7
	@$(SIMULATION) $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first $(FIRST))

mutants: $(VENV)/dev.stamp ## plant faults, and print after how many simulated worlds each is found
	@$(SIMULATION) --mutants

EXAMPLES := 1000

machines: $(VENV)/dev.stamp ## run EXAMPLES random sequences of calls against each kind of service, with torch beside it
	BATCHNORM_TEST_MACHINES=$(EXAMPLES) $(BIN)/pytest tests/machines $(ARGS)

CASES := 20000

schemathesis: $(VENV)/dev.stamp ## send about CASES requests that schemathesis makes from the OpenAPI document
	BATCHNORM_TEST_CASES=$(CASES) $(BIN)/pytest tests/openapi $(ARGS)

MINUTES := 10
FUZZ = PYTHONPATH=tests $(BIN)/python -m fuzz

fuzz: $(VENV)/fuzz.stamp ## feed the parsers bytes for MINUTES=10, only one TARGET=json, or replay an INPUT=file of it
	@$(FUZZ).run --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET)) $(if $(INPUT),--input $(INPUT))

fuzz-keep: $(VENV)/dev.stamp ## copy found inputs that reach new lines to the corpus in the repository
	@$(FUZZ).keep $(TARGET)

# Where there is no atheris for this Python, fuzzing is not guided by coverage.
$(VENV)/fuzz.stamp: $(VENV)/dev.stamp
	@$(PIP) install $(CONSTRAINTS) --only-binary atheris --editable '.[fuzz]' || true
	@touch $@

# The benchmarks have their own environment; benchmarks/peers makes one for each of the other servers.
.venv-bench/bench.stamp: pyproject.toml constraints.txt
	@echo "Setting up .venv-bench (once) ..."
	@.venv-bench/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-bench
	@.venv-bench/bin/python -m pip --disable-pip-version-check --quiet install $(CONSTRAINTS) "$$(grep '^torch==' constraints.txt)"
	@.venv-bench/bin/python -m pip --disable-pip-version-check --quiet install $(CONSTRAINTS) --editable '.[service,otel]' py-spy
	@touch $@

LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" $(SUPPLY)/bin/uv pip compile --quiet --universal --generate-hashes --no-annotate \
	--python-version 3.11 $(CONSTRAINTS)
ANY_TORCH := --no-emit-package torch --excludes requirements/cuda.txt

lock: $(SUPPLY)/supply.stamp ## write the versions of constraints.txt with hashes to requirements/*.txt
	$(LOCK) pyproject.toml --extra service --extra otel $(ANY_TORCH) --output-file requirements/service.txt
	$(LOCK) pyproject.toml --extra service --extra otel --extra torch --extra demo --extra dev $(ANY_TORCH) --output-file requirements/dev.txt
	grep '^torch==' constraints.txt | $(LOCK) - --output-file requirements/torch.txt
	$(LOCK) requirements/supply.in --output-file requirements/supply.txt

SHIPPED = { sed -n '/^torch==/,/[^\\]$$/p' requirements/torch.txt; cat requirements/service.txt; }

sbom: $(SUPPLY)/supply.stamp ## list what the service consists of in build/sbom.json (CycloneDX)
	@mkdir -p build
	@$(SHIPPED) | $(SUPPLY)/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom.json -

licences: $(VENV)/service.stamp $(SUPPLY)/supply.stamp ## write the licences of these packages to docs/licences.md
	@{ printf '# Licences\n\nOf the packages that the service is installed with on Linux, written by `make licences`.\n'; \
		printf 'The metadata of pysimdjson name none; its file LICENSE is the MIT License.\n\n'; \
		printf 'The page contains uPlot 1.6.32 (MIT License) and, of the font Inter, the file of @fontsource-variable/inter 5.3.0\n'; \
		printf '(SIL Open Font License 1.1); the licences are in `service/batchnorm_service/ui/licences`.\n\n'; \
		$(SUPPLY)/bin/pip-licenses --python $(BIN)/python --format markdown --with-system --packages \
		$$($(SHIPPED) | sed -n 's/^\([a-z0-9-]*\)==.*/\1/p') | sed -E 's/\+(cpu|cu[0-9]+) /     /'; } > docs/licences.md

dist: $(SUPPLY)/supply.stamp ## build the packages into dist/
	@$(SUPPLY)/bin/uv build --quiet --out-dir dist

IMAGE := batchnorm

TORCH := cpu

image: ## build the image IMAGE=batchnorm with TORCH=cpu or cuda; PIP_EXTRA_INDEX_URL may name another index with the CPU build
	docker build --build-arg TORCH=$(TORCH) --build-arg PIP_EXTRA_INDEX_URL --build-arg REVISION="$$(git rev-parse HEAD)" --tag $(IMAGE) .

image-check: ## start the image once, and wait until it is healthy
	@container=$$(docker run --detach --rm $(IMAGE)); trap "docker stop $$container > /dev/null" EXIT; \
	for _ in $$(seq 60); do \
		if [ "$$(docker inspect --format '{{.State.Health.Status}}' $$container)" = healthy ]; then exit 0; fi; sleep 1; \
	done; docker logs $$container; exit 1

checkov: $(CHECKOV)/checkov.stamp ## look for insecure settings in the Dockerfile and the manifests of deploy/kubernetes
	@mkdir -p build
	@for overlay in single replicas gpu; do kubectl kustomize deploy/kubernetes/$$overlay > build/$$overlay.yaml || exit 1; done
	$(CHECKOV)/bin/checkov --config-file deploy/kubernetes/checkov.yaml --file build/single.yaml build/replicas.yaml build/gpu.yaml
	$(CHECKOV)/bin/checkov --framework dockerfile --skip-download --compact --quiet --file Dockerfile

$(CHECKOV)/checkov.stamp: Makefile
	@echo "Setting up $(CHECKOV) (once) ..."
	@$(PYTHON) -m venv --clear $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip --disable-pip-version-check --quiet install checkov==3.3.30
	@touch $@

$(SUPPLY)/supply.stamp: requirements/supply.txt
	@echo "Setting up $(SUPPLY) (once) ..."
	@$(PYTHON) -m venv --clear $(SUPPLY)
	@$(SUPPLY)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --no-deps --requirement requirements/supply.txt
	@touch $@

clean: ## remove everything that the targets created
	rm -rf $(VENV) $(GENERATORS) $(INFERENCE) $(DEPLOY) $(LOWEST) $(SUPPLY) $(BROWSER) $(CHECKOV) build dist .venv-bench .venv-bench-* .coverage .coverage.* .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache
