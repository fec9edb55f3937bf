# Two commands on a fresh machine (CPython >= 3.11 with venv, make):
#   make demo    install into .venv, train three tasks on real digits on two processes, evaluate
#   make test    the tests, in the same environment; make test-all: also the whole products of ways to train
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# A module's tests share their runs, so they stay on one worker; the long ones come first. One worker more than two cores
# have work for: some tests wait.
PYTEST_FLAGS ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: docs demo test test-all fuzz test-oldest test-slurm lint install install-all clean

# What a user needs; the tests' own tools come on top of it.
install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python >= 3.11, found " + sys.version)'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(PIP_INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[demo,dev,fast]'
	touch $@

# All of that at once.
install-all: setup.cfg pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(PIP_INSTALL) --editable '.[demo,dev,fast,docs]'
	touch $(VENV)/installed $(VENV)/installed-dev $(VENV)/installed-docs

data/digits/dataset.json: | install
	$(BIN)/mtl prepare digits data/digits

demo: install data/digits/dataset.json
	$(BIN)/mtl launch configs/digits.yaml --nproc 2

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slurm and not exhaustive"

# Also every method under every engine in every way (docs/support.md), of which `make test` tries every two, and
# every backbone, of which it tries one of each family.
test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slurm"

# A hundred times as many damaged files as `make test` tries.
fuzz: $(VENV)/installed-dev
	FUZZ_CASES=15000 $(BIN)/python -m pytest tests/faults/test_fuzz.py --timeout 0

# On a real Slurm of two nodes on this machine, as root, with nothing else running: the tests end jobs by their
# clocks. 7 to 15 minutes.
test-slurm: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/slurm

# With the oldest releases that setup.cfg allows, in an environment of its own (several GB).
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(PYTEST_FLAGS) -m "not slurm and not exhaustive" tests/unit tests/integration

.venv-oldest/installed: setup.cfg tests/oldest_pins.py
	$(PYTHON) -m venv --upgrade-deps .venv-oldest
	$(PYTHON) tests/oldest_pins.py > .venv-oldest/pins.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint .venv-oldest/pins.txt \
		--editable '.[demo,dev,fast,tiff]'
	touch $@

# The documentation as a site, build/site/index.html; a broken link is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[demo,docs]'
	touch $@

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info .pytest_cache .ruff_cache .mypy_cache
