# Needs Python 3.11 to 3.13, git and make; everything else is installed into .venv.
PYTHON ?= python3
UV_VERSION := 0.13.9
BENCH_DATA ?=
BIN := .venv/bin
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/.venv

.PHONY: setup demo serve test chaos check bench load clean

setup: .venv/installed

.venv/installed: uv.lock pyproject.toml
	@echo "installing into .venv (about 3 GB; takes a minute or two the first time)"
	@start=$$(date +%s); \
	$(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) && \
	$(BIN)/uv sync --quiet --frozen --all-extras --inexact --compile-bytecode && \
	touch $@ && echo "installed in $$(($$(date +%s) - start)) s"

demo: setup  ## the main job on a real model, from training to the table
	@$(BIN)/python demo/run.py

serve: setup  ## the whole service, until Ctrl-C
	@$(BIN)/litesmith serve

test: setup  ## all tests
	@start=$$(date +%s); $(BIN)/python -m pytest && \
	echo "tests took $$(($$(date +%s) - start)) s"

chaos: setup  ## 200 kills at random seeded moments, and 500 damaged files; 20 to 30 minutes
	@rm -rf build/chaos; $(BIN)/python -m pytest tests/chaos tests/attacks -m chaos $(CHAOS) && \
	$(BIN)/python tests/chaos/figures.py build/chaos

check: setup  ## style, types, dependency direction
	@start=$$(date +%s); \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && \
	$(BIN)/mypy && PYTHONPATH=. $(BIN)/lint-imports && \
	echo "checks took $$(($$(date +%s) - start)) s"

bench: setup  ## make bench BENCH_DATA=DIR: against a plain TensorFlow script
	@$(BIN)/python -m bench.run $(BENCH_DATA)

load: setup  ## 50 clients while jobs run; lists of 100,000 jobs
	@$(BIN)/python -m bench.load

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache
