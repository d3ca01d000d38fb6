# `make demo` and `make test` set everything up themselves, in .venv, from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# One thread per test process: two of them share the work.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo demo-vae test test-slow test-lowest browser lint docs clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

# The same on the latents of a VAE trained here. More threads only wait for each other on its small convolutions.
demo-vae: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_vae.py --digits
	$(BIN)/python examples/quickstart.py --vae outputs/vae/vae --output_dir outputs/quickstart-vae

test: .venv/installed
	$(PYTEST)

test-slow: .venv/installed
	$(PYTEST) -m slow --dist worksteal

# Chromium of Debian, for the tests of the page; without it they are skipped.
browser:
	command -v chromium || { $(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium; }

# The same tests on the lowest supported transformers, laid over the environment.
test-lowest: .venv-lowest/installed
	PYTHONPATH=.venv-lowest $(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in outputs/site. A broken link or a docstring that cannot be read is an error.
docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

.venv-lowest/installed: .venv/installed
	rm -rf .venv-lowest
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv-lowest 'transformers==$(LOWEST).*'
	touch $@

clean:
	rm -rf .venv .venv-lowest outputs
