# Two commands: `make demo` runs the main job on the embedded world, `make test` checks everything. Both build .venv.
# `make portable` runs the numerical tests again as another processor would: other instructions, so other rounding.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test portable heavy clean

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

portable: export ATEN_CPU_CAPABILITY = default
portable: export ONEDNN_MAX_CPU_ISA = AVX2
portable: export MKL_ENABLE_INSTRUCTIONS = AVX2
portable: export OMP_NUM_THREADS = 2
portable: .venv/installed
	$(BIN)/pytest -n auto --dist loadfile tests/algorithms tests/test_branches.py tests/test_sampling.py \
		tests/test_golden.py tests/test_stages.py tests/test_world.py

heavy: .venv/installed
	$(BIN)/pytest -m heavy

clean:
	rm -rf .venv runs
