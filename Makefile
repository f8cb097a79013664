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
	$(BIN)/pytest -n auto --dist loadfile tests/algorithms tests/test_branches.py tests/test_sampling.py tests/test_samplers.py \
		tests/test_golden.py tests/test_world.py \
		tests/test_settings.py::test_the_runtime_changes_nothing_but_rounding \
		tests/test_stages.py::test_samples_keep_the_samplers_logprobs \
		tests/test_stages.py::test_reward_model_orders_pairs \
		tests/test_stages.py::test_dpo_prefers_the_chosen_and_takes_reference_logprobs_from_sampling \
		tests/test_stages.py::test_ppo_starts_at_its_reference_and_raises_the_score

heavy: .venv/installed
	$(BIN)/pytest -m heavy

clean:
	rm -rf .venv runs
