# Everything sets itself up: a machine with Python 3.10 to 3.13 and make is enough.
PYTHON ?= python3
WORKERS ?= 2
# "no" leaves out the tests that need Chromium.
BROWSER ?= yes
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo chromium test compatibility audit docs lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --constraint constraints.txt setuptools torch
	$(RUN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(READY)  ## train, fuse and finetune a small model on handwritten digits
	$(RUN)/mctf demo

# As root on Debian, Chromium is installed for the tests; elsewhere it has to be there.
chromium:
ifneq ($(BROWSER),no)
	-@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	    test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes chromium)
endif

test: lint chromium  ## lint and the whole test suite, in two processes or as many as WORKERS says
	$(RUN)/pytest --numprocesses $(WORKERS) --dist worksteal --durations 30 $(if $(filter no,$(BROWSER)),-m "not browser")

compatibility: $(READY)  ## what depends on them, with the oldest and newest transformers, torch, Lightning, datasets
	$(RUN)/nox --session compatibility

audit: $(READY)  ## known weaknesses of the packages in constraints.txt
	$(RUN)/nox --session audit

docs: $(READY)  ## the documentation as a site, in site/
	$(RUN)/mkdocs build --strict

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy --num-workers $(WORKERS)

format: $(READY)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) .nox outputs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
