# Two commands: `make demo` runs the main job on the embedded world, `make test` checks everything. Both build .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test heavy clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	touch $@

demo: .venv/installed
	$(BIN)/mixpo run

test: .venv/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto --dist loadfile

heavy: .venv/installed
	$(BIN)/pytest -m heavy

clean:
	rm -rf .venv runs
