PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := .venv-supply
MODEL := smollm2-135m-instruct
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env serve test test-all gpu lint reliability mutation soak lock audit sbom clean

help:
	@echo "make serve   install into $(VENV) and serve $(MODEL) on 127.0.0.1:8000"
	@echo "make test    install into $(VENV), lint, type-check and test"
	@echo "make test-all   the same, with every setting on every length"
	@echo "make gpu     on a machine with a GPU: its tests, with PYTHON's torch, and vLLM if it is there"
	@echo "make lint    the checks of make test without the tests"
	@echo "make reliability   hostile requests, deaths, drains, overload, hang-ups, ten minutes of all"
	@echo "make mutation   change admission, keys and salts; say which changes no test notices"
	@echo "make soak    serve 10,000 short requests and see that nothing grows"
	@echo "make lock    write the lock files of the images anew (ARGS=--upgrade: newest versions)"
	@echo "make audit   look for known vulnerabilities in the locks; fails where it cannot see"
	@echo "make sbom    write what the CPU image installs to out/sbom.cdx.json"
	@echo "make clean   remove $(VENV), $(SUPPLY) and caches (models in the user cache stay)"
	@echo
	@echo "ARGS='...' goes to 'trimtab serve' or 'pytest'; PYTHON=... names the Python (3.11+)"

env:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "trimtab: no '$(PYTHON)' here: install Python 3.11+, or say make PYTHON=/path"; exit 1; }
	@$(PYTHON) deploy/cpu/install.py $(VENV) --extras cpu,eval,test,dev

serve: env
	$(BIN)/trimtab models prepare $(MODEL)
	$(BIN)/trimtab serve --host 127.0.0.1 --port 8000 $(ARGS)

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# One process has the tests that need an engine, the other has the rest.
test: lint
	$(BIN)/pytest -n 2 --dist loadgroup -m "not long" $(ARGS)

test-all: lint
	$(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

# In an environment of one's own: what is installed by env is for CPUs. Without vLLM the kernels and
# their figures are tested all the same.
GPU_TESTS := tests/server/kernels tests/benchmarks/test_gpu_kernels.py \
  tests/benchmarks/test_gpu_figures.py tests/integration/test_on_gpu.py

gpu:
	@$(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	  { echo "trimtab: $(PYTHON) has no torch that sees a GPU here"; exit 1; }
	$(PYTHON) -m pytest $(GPU_TESTS) $(ARGS)

reliability: env
	$(BIN)/trimtab models prepare $(MODEL)
	RELIABILITY_EXAMPLES=200 SOAK_SECONDS=600 $(BIN)/pytest tests/reliability \
	  tests/integration/state/test_hang_ups.py tests/integration/state/test_soak.py \
	  --timeout 3600 --log-cli-level=INFO $(ARGS)

mutation: env
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

soak: env
	SOAK_REQUESTS=10000 $(BIN)/pytest tests/integration/state/test_growth.py --log-cli-level=INFO $(ARGS)

# Beside the other environment: these tools' own dependencies are not to change what is tested.
$(SUPPLY)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(SUPPLY)
	$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*p['optional-dependencies']['supply'], sep='\n')" > $(SUPPLY)/requirements.txt
	$(SUPPLY)/bin/pip install --requirement $(SUPPLY)/requirements.txt
	touch $@

lock: $(SUPPLY)/installed
	$(SUPPLY)/bin/python -m deploy.lock $(ARGS)

audit: $(SUPPLY)/installed
	$(SUPPLY)/bin/python -m deploy.audit $(ARGS)

sbom: $(SUPPLY)/installed
	$(SUPPLY)/bin/python -m deploy.sbom $(ARGS)

clean:
	rm -rf $(VENV) $(SUPPLY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache .hypothesis .schemathesis mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
