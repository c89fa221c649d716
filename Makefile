.PHONY: lint type test slow bench docs

PYTHON ?= .venv/bin/python

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

bench:
	$(PYTHON) -m benchmarks.denoiser

docs:
	$(PYTHON) -m mkdocs build --strict
