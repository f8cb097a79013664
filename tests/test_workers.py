"""Stages side by side in processes: the same results, the same failures, and nothing that goes on alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mixpo.data.errors import InputError
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.experiments.results import load_runs, read_evaluation_summary
from mixpo.experiments.run import run_recipe
from mixpo.experiments.workers import StageFailure, compute_stage_or_failure
from mixpo.stages.stage_cache import StageCache
from mixpo.training.record import progress_listener
from mixpo.training.runtime import Runtime, count_cores
from process_pairs import StageFailingInOneProcess
from recording_display import RecordingDisplay

TINY = [
    "arms=[sft,dpo,ppo]",
    "seeds=[0,1]",
    "data.train_rows=128",
    "data.test_rows=16",
    "data.demonstration_rows=128",
    "samples.prompts=32",
    "ppo.batch_size=16",
    "evaluation.prompts=16",
    "max_completion_tokens=12",
    "runtime.threads=1",
]


def tiny_recipe(home: Path, workers: int, *overrides: str) -> Recipe:
    words = [*TINY, f"runtime.workers={workers}", f"cache={home / 'cache'}", f"out={home / 'run'}", *overrides]
    return read_recipe("world", words)


def scores(home: Path) -> list[float]:
    return [read_evaluation_summary(arm)["score"]["mean"] for arm in load_runs(home / "run").arms]


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordingDisplay]:
    home, display = tmp_path_factory.mktemp("two"), RecordingDisplay()
    run_recipe(tiny_recipe(home, 2), display)
    return home, display


def test_two_workers_find_what_one_finds(side_by_side: tuple[Path, RecordingDisplay], tmp_path: Path) -> None:
    home, display = side_by_side
    alone = RecordingDisplay()
    run_recipe(tiny_recipe(tmp_path, 1), alone)
    assert scores(home) == scores(tmp_path)
    assert sorted(display.started) == sorted(alone.started)
    assert (display.most_at_once, alone.most_at_once) == (2, 1)
    assert display.steps == alone.steps
    assert not multiprocessing.active_children()


def test_alone_an_arm_is_finished_before_the_next_begins(tmp_path: Path) -> None:
    display, listener = RecordingDisplay(), progress_listener.get()
    run_recipe(tiny_recipe(tmp_path, 1, "seeds=[0]", "arms=[dpo,ppo]"), display)
    assert progress_listener.get() is listener, "a display that has ended is told nothing more"
    assert display.started[-4:] == ["DPO for dpo", "Evaluation for dpo", "PPO for ppo", "Evaluation for ppo"]


def test_a_failure_in_a_process_takes_only_its_arm_along(side_by_side: tuple[Path, RecordingDisplay]) -> None:
    home, _ = side_by_side
    display = RecordingDisplay()
    result = run_recipe(tiny_recipe(home, 2, "ppo.max_kl=1e-6", "seeds=[0]", f"out={home / 'failed'}"), display)
    assert [(arm.name, arm.status) for arm in result.arms] == [("sft", "done"), ("dpo", "done"), ("ppo", "failed")]
    assert len(display.failures) == 1
    assert "ran away" in display.failures[0].reason


def test_a_failure_on_a_full_disk_is_told_without_its_details(tmp_path: Path) -> None:
    stage_cache, stage = StageCache(tmp_path, Runtime(device="cpu")), StageFailingInOneProcess(how="raises")
    (stage_cache.locate_folder(stage) / "failure.txt").mkdir(parents=True)  # so that it cannot be written
    outcome = compute_stage_or_failure(stage_cache, stage)
    assert isinstance(outcome, StageFailure)
    assert "ValueError: it raises (details could not be written: [Errno 21] Is a directory" in outcome.reason


def test_bad_input_found_in_a_process_is_raised(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    words = ["data.format=preference", f"data.train={tmp_path / 'pairs.jsonl'}", "data.train_rows=null"]
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        run_recipe(tiny_recipe(tmp_path, 2, *words), RecordingDisplay())


def test_a_process_that_is_killed_stops_the_run_with_one_line(
    side_by_side: tuple[Path, RecordingDisplay], tmp_path: Path
) -> None:
    class WorkerKillingDisplay(RecordingDisplay):
        def on_step(self, done: int, total: int, metrics: object) -> None:
            if self.running == 2:
                max(multiprocessing.active_children(), key=lambda process: process.pid or 0).kill()

    home, _ = side_by_side
    recipe = tiny_recipe(home, 2, "ppo.kl_coef=0.3", f"out={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"runtime\.workers: found 2, and one of the processes was killed"):
        run_recipe(recipe, WorkerKillingDisplay())
    again = run_recipe(recipe, RecordingDisplay())
    assert again.computed == 4, "the same command goes on: PPO and its evaluation at two seeds"


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_run_that_is_stopped(
    side_by_side: tuple[Path, RecordingDisplay], tmp_path: Path, by: signal.Signals
) -> None:
    """Killed alone, or by Ctrl-C, which goes to all of them."""
    words = [*TINY, "runtime.workers=2", f"cache={side_by_side[0] / 'cache'}", f"out={tmp_path / 'run'}"]
    handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job's child may not
    main = f"{handler}; from mixpo.cli.main import main; main()"
    endless = ["ppo.kl_coef=0.4", "ppo.epochs=10000"]  # 20,000 iterations
    command = [sys.executable, "-c", main, "run", "-q", *words, *endless]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: output.read_text().count("/20000") >= 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        os.kill(process.pid, by) if by == signal.SIGKILL else os.killpg(process.pid, by)
        process.wait(60)
        wait_until(lambda: not any(Path(f"/proc/{one}").exists() for one in children))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in output.read_text()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited for two minutes in vain")


def test_workers_are_a_number_or_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runtime(device="cpu", workers="cores").count_workers() == count_cores()
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 1)
        assert Runtime(workers="cores").count_workers() == 1, "a GPU is shared by none"
        patch.setattr("mixpo.training.runtime.count_cores", lambda: 7)
        assert Runtime(device="cpu", workers="cores").count_workers() == 7
        assert Runtime(device="cpu", workers="cores", processes=2).count_workers() == 3
    for value in ("core", "0", "true"):
        with pytest.raises(InputError, match=r"runtime\.workers: found .*; expected a number.*"):
            read_recipe("world", [f"runtime.workers={value}"])


def test_defaults_are_those_of_the_machine_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = Runtime(sampling_gib=3.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    here = submitted.decide_defaults_here()
    assert (submitted.microbatch_tokens, here.microbatch_tokens) == (2048, 16_384)
    assert here.sampling_gib == 3.0
    assert submitted.model_copy(update={"threads": 5}).decide_defaults_here().threads == 5


TASK = {"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 16),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({**TASK, "SLURM_CPUS_PER_TASK": "12"}, 12),
        ({**TASK, "SLURM_CPUS_PER_TASK": "64"}, 16),
        (TASK, 2),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "12"}, 12),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "16"}, 2),
    ],
    ids=["alone", "launcher", "task", "more than there are", "unknown", "one task", "launcher in a task"],
)
def test_threads_are_the_share_of_a_process_or_the_cores_of_its_task(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    """16 cores are there: all of a machine's, or what Slurm has bound the task to."""
    threads = list[int]()
    for name in [*TASK, "SLURM_CPUS_PER_TASK"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mixpo.training.runtime.count_cores", lambda: 16)
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    Runtime(device="cpu").set_up_processes()
    assert threads == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_gpu_is_missed_where_a_stage_is_computed() -> None:
    runtime = read_recipe("world", ["runtime.device=cuda"]).runtime
    with pytest.raises(InputError, match=r"runtime\.device: found 'cuda' .* torch finds none; set runtime\.device=cpu"):
        runtime.set_up_processes()
