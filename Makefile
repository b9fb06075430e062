# Everything starts from a bare machine: each target installs what it needs into .venv first.
.PHONY: setup browser demo stack stack-down run test check bench soak docs clean

WORK ?= work
export VC2_WORK := $(abspath $(WORK))
PYTHON_BIN := .venv/bin/python

setup:  ## make .venv with the pinned packages
	@infra/setup.sh

browser:  ## a Chromium for the tests of pages, where this user may install one
	@infra/browser.sh

demo: setup  ## the whole pipeline, small and real: ends with the path of an HTML report
	@$(PYTHON_BIN) -m flows.stack demo

stack: setup  ## Prefect server, worker, file server and deployments on loopback, left running; again at any time
	@$(PYTHON_BIN) -m flows.stack up

stack-down: setup  ## stop what `make stack` started
	@$(PYTHON_BIN) -m flows.stack down

TEST_WORKERS ?= 2

test: setup  ## all tests but the long ones, on two workers
	@$(PYTHON_BIN) -m pytest -m "not soak and not gpu" -n $(TEST_WORKERS)

soak: setup  ## the laws about kills, with many kills
	@$(PYTHON_BIN) -m pytest -m soak --timeout=7200

check: setup  ## lint, format, types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/basedpyright

bench: setup  ## clips/s, images/s, loader samples/s, steps/s beside their limits, what metrics share; writes benchmarks/results/
	@$(PYTHON_BIN) -m benchmarks.data
	@$(PYTHON_BIN) -m benchmarks.loader
	@$(PYTHON_BIN) -m benchmarks.run
	@$(PYTHON_BIN) -m benchmarks.train
	@$(PYTHON_BIN) -m benchmarks.states
	@$(PYTHON_BIN) -m benchmarks.evaluate
	@$(PYTHON_BIN) -m benchmarks.plan
	@$(PYTHON_BIN) -m benchmarks.orchestration

docs: setup  ## the documentation as a site in work/site
	@.venv/bin/mkdocs build --quiet --strict --site-dir $(VC2_WORK)/site && echo "$(VC2_WORK)/site/index.html"

clean:  ## remove the work folder and caches (not .venv)
	rm -rf $(WORK) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
