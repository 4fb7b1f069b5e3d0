# The verbs of this checkout.  They need python3 (3.11 or newer, with venv) and make, nothing else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
OLDEST := .venv/oldest
# Of our own: what idemp needs, and each driver.  The others hold tools and examples.
DRIVERS := rabbitmq etcd redis postgresql mongodb statsd prometheus audit
UV := uv==0.13.8

.DEFAULT_GOAL := help
.PHONY: help demo test oldest servers compose-check lint bench chaos lock clean

help: ## list these verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read verb does; do \
		printf '  %-18s %s\n' "$$verb" "$$does"; done

demo: $(READY) ## see idemp at work, on an embedded stack: no server needed; STACK=real: RabbitMQ and etcd
	@$(BIN)/python -m $(if $(filter real,$(STACK)),tests.demo,idemp demo)

test: $(READY) ## run the whole suite, after make servers, on JOBS cores; ARGS='-k claim' goes to pytest
	@$(BIN)/python -m tests.servers || test -z "$$CI" # a laptop without one skips its tests, and says so
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),auto) --maxprocesses 4 --dist worksteal $(ARGS)

# First on the path, before what the lock brought.
oldest: $(OLDEST)/ready ## run the contracts with the oldest dependencies that pyproject.toml allows
	@PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest --numprocesses $(or $(JOBS),auto) --maxprocesses 4 --dist worksteal \
		-k 'not sqlite and not memory' tests/contract tests/test_message.py tests/test_metrics.py tests/test_oldest.py \
		$(ARGS)

servers: $(READY) ## make sure that the real servers that the tests need are here
	@$(BIN)/python -m tests.servers

compose-check: $(READY) ## bring docker-compose.yaml up, look closely, take it down; root needs no engine
	@$(BIN)/python -m tests.compose_check

lint: $(READY) ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(READY) ## measure
	@$(BIN)/python -m bench $(ARGS)

chaos: $(READY) ## break everything for MINUTES by the plan of SEED; PROFILE=quick, full or soak; STORE=redis; ARGS='--out DIR'
	@$(BIN)/python -m tests.chaos run --seed $(or $(SEED),1) --minutes $(or $(MINUTES),3) \
		--profile $(or $(PROFILE),quick) --store $(or $(STORE),etcd) $(ARGS)

lock: ## pin every dependency anew, for every platform, with its hashes
	@$(PYTHON) -m venv .venv/lock
	@.venv/lock/bin/pip install --quiet $(UV)
	@.venv/lock/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-annotate --quiet --upgrade \
		--custom-compile-command 'make lock' --output-file requirements.lock
	@.venv/lock/bin/uv pip compile pyproject.toml $(DRIVERS:%=--extra %) --universal --python-version 3.11 \
		--generate-hashes --no-annotate --quiet --upgrade --resolution lowest-direct \
		--custom-compile-command 'make lock' --output-file requirements.oldest.lock

clean: ## remove what the other verbs made
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(OLDEST)/ready: $(READY) requirements.oldest.lock
	rm -rf $(OLDEST)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(OLDEST) \
		-r requirements.oldest.lock
	@touch $@

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "idemp needs Python 3.11 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' came without venv: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
