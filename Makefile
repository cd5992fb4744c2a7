# The whole developer interface: install, demo, check, test, test-all, bench.
PYTHON ?= python3
# Test processes: each takes 1.5 GB and one core.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
VLLM := .vllm

.PHONY: install $(VLLM) demo check format test test-all bench docs clean

install: $(VENV)/.installed

# --no-compile: pip takes 50 s of a core for 285 MB of Python, of which a tenth is ever imported.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Burnish needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cure: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]' --constraint constraints.txt
	@touch $@

# vLLM for CPUs, over .venv: what the tests of `engine: {type: vllm}` run in.
$(VLLM): $(VLLM)/.installed

$(VLLM)/.installed: $(VENV)/.installed scripts/install_vllm_cpu scripts/vllm_cpu.txt
	scripts/install_vllm_cpu $(VLLM)
	@mkdir -p $(VLLM) && touch $@

demo:
	@started=$$(date +%s); $(MAKE) --no-print-directory install && $(BIN)/python scripts/demo.py --started $$started

check: install
	scripts/check

format: install
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

# The checks take 40 s of a core that the tests leave free.
test: install $(VLLM)/.installed
	@mkdir -p .cache; scripts/check > .cache/check.log 2>&1 & checks=$$!; \
	$(BIN)/python -m pytest -m "not long and not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$checks; checks=$$?; cat .cache/check.log; exit $$(( tests || checks ))

test-all: check $(VLLM)/.installed
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python -m bench

docs: install
	$(BIN)/python scripts/recipe_reference.py

clean:
	rm -rf $(VENV) $(VLLM) .cache build dist
