# Everything sets itself up: a machine with Python 3.10 to 3.13 and make is enough.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test compatibility lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --constraint constraints.txt setuptools torch
	$(RUN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(READY)  ## train, fuse and finetune a small model on handwritten digits
	$(RUN)/mctf demo

test: lint  ## lint and the whole test suite, in two processes or as many as WORKERS says
	$(RUN)/pytest --numprocesses $(WORKERS) --dist worksteal

compatibility: $(READY)  ## what depends on transformers, with its oldest and newest release
	$(RUN)/nox

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(READY)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) .nox outputs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
