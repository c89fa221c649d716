.PHONY: lint type test slow bench docs release-check

PYTHON ?= .venv/bin/python

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	PATH="$(dir $(PYTHON)):$$PATH" lint-imports

type:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

bench:
	$(PYTHON) -m benchmarks.denoiser

docs:
	$(PYTHON) docs/make_architecture.py
	$(PYTHON) -m mkdocs build --strict

# Check the contents of wheel and sdist, and install them with all dependencies (gigabytes).
release-check:
	RELEASE_CHECK=1 $(PYTHON) -m pytest -m "slow or not slow" tests/test_release.py
