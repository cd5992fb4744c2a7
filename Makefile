# The whole developer interface: install, demo, check, test, test-all, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo check format test test-all bench docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Burnish needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cure: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo:
	@started=$$(date +%s); $(MAKE) --no-print-directory install && $(BIN)/python scripts/demo.py --started $$started

check: install
	scripts/check

format: install
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

# The checks take 40 s of a core that the tests leave free.
test: install
	@mkdir -p .cache; scripts/check > .cache/check.log 2>&1 & checks=$$!; \
	$(BIN)/python -m pytest -m "not long and not gpu"; tests=$$?; \
	wait $$checks; checks=$$?; cat .cache/check.log; exit $$(( tests || checks ))

test-all: check
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python -m bench

docs: install
	$(BIN)/python scripts/recipe_reference.py

clean:
	rm -rf $(VENV) .cache build dist
