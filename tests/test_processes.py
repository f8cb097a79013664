"""One stage in two processes: the same rows, losses and weights as in one, and no process that waits for ever."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mixpo.data.errors import InputError
from mixpo.experiments.workers import ProcessPool, StageFailure
from mixpo.models.samplers import LocalSampler
from mixpo.models.sampling import sample_completions
from mixpo.stages.rows import read_table
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_summary
from mixpo.training import parallel
from mixpo.training.parallel import SharedSampler, StageProcesses
from mixpo.training.record import MetricsLog, read_metrics
from mixpo.training.runtime import Runtime
from mixpo.training.step import Diverged, OptimizerSettings, make_optimizer, take_optimizer_step
from models import tiny as tiny_model
from process_pairs import FailingInOne, ProcessPair, start_process_pair
from recording_display import RecordingDisplay
from worlds import TINY_RUNTIME, TinyWorld


@pytest.fixture(scope="module")
def pair() -> Iterator[ProcessPair]:
    with start_process_pair() as pair:
        yield pair


def share_rows(processes: StageProcesses, count: int) -> Any:
    computed: list[int] = []

    def compute(rows: list[int]) -> list[torch.Tensor]:
        computed.extend(rows)
        longest = max(rows)
        return [
            torch.tensor([[float(row)] * row + [0.0] * (longest - row) for row in rows]),
            torch.tensor([[row] for row in rows]),
        ]

    order = sorted(range(count), reverse=True)
    padded, numbers = processes.compute_tensors(count, compute, order=order)
    return computed, padded.tolist(), numbers.tolist()


def test_every_process_computes_its_share_and_has_all_rows(pair: ProcessPair) -> None:
    (first, *whole), (second, *same) = pair.call(share_rows, 5)
    assert (first, second) == ([0, 2, 4], [1, 3])
    assert whole == same == [[[float(row)] * row + [0.0] * (4 - row) for row in range(5)], [[row] for row in range(5)]]
    (first, *whole), (second, *same) = pair.call(share_rows, 1)
    assert (first, second) == ([0], [])
    assert whole == same


def sum_some_gradients(processes: StageProcesses) -> Any:
    parallel.BUCKET_NUMBERS = 5
    parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 3, 7, 1, 4)]
    for index, parameter in enumerate(parameters):
        if index == 4 or (index == 0 and processes.rank == 0):
            continue
        parameter.grad = torch.arange(float(len(parameter))) + 10 * processes.rank
    processes.sum_gradients(parameters)
    return [None if one.grad is None else one.grad.tolist() for one in parameters]


def test_gradients_are_summed_and_those_that_nobody_has_stay_none(pair: ProcessPair) -> None:
    results = pair.call(sum_some_gradients)
    assert results[0] == results[1]
    expected = [[10.0, 11.0], [10.0, 12.0, 14.0], [10.0 + 2 * n for n in range(7)], [10.0], None]
    assert results[0] == expected


def diverge_in_one(processes: StageProcesses, value: float) -> Any:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([weight], OptimizerSettings(learning_rate=0.1))
    factor = value if processes.rank == 1 else 1.0
    try:
        take_optimizer_step(
            optimizer,
            [factor],
            lambda factor: ((factor * weight).sum(), {}),
            loss_divisor=2,
            max_grad_norm=1.0,
            learning_rate=0.1,
            processes=processes,
        )
    except Diverged as error:
        return str(error), float(weight)
    return None, float(weight)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(pair: ProcessPair) -> None:
    assert pair.call(diverge_in_one, float("nan")) == [("the loss is nan", 1.0)] * 2
    assert pair.call(diverge_in_one, 3.0) == [(None, pytest.approx(0.9))] * 2


def raise_in_one(processes: StageProcesses) -> None:
    if processes.rank == 1:
        raise InputError("row 7 is broken")
    processes.wait_for_all()


def test_an_error_in_one_process_is_the_error_of_both(pair: ProcessPair) -> None:
    started = time.monotonic()
    for error in pair.call(raise_in_one):
        assert type(error) is InputError
        assert error.args == ("row 7 is broken", False)
        assert "in raise_in_one" in "".join(error.__notes__)
    assert time.monotonic() - started < 60, "and not after a time limit"
    assert pair.call(share_rows, 3)[0][0] == [0, 2], "they go on with the next stage"


def sample_in_shares(processes: StageProcesses) -> Any:
    sampler = SharedSampler(LocalSampler(cache_bytes=1 << 20), processes)
    sampler.load_policy(tiny_model("llama"))
    sampled = sampler.draw(PROMPTS, k=2, max_tokens=8, seed=3)
    return sampled.to_lists(), sampled.logprobs, sampled.ended


PROMPTS = [[3, 9, 4], [12, 13], [3, 9, 4], [3, 9, 4], [7]]


def test_completions_are_the_same_whoever_samples_them(pair: ProcessPair) -> None:
    expected = sample_completions(tiny_model("llama"), PROMPTS, k=2, max_tokens=8, seed=3)
    for tokens, logprobs, ended in pair.call(sample_in_shares):
        assert tokens == expected.to_lists()
        torch.testing.assert_close(logprobs, expected.logprobs, rtol=0, atol=1e-5)
        assert ended.tolist() == expected.ended.tolist()


TWO = Runtime(device="cpu", threads=1, processes=2, microbatch_tokens=100, sampling_gib=1e-4, checkpoint_minutes=0)


class StagesInTwoProcesses:
    """A pool of one group of two processes, with a cache of its own in which inputs of stages are copied."""

    def __init__(self, tiny: TinyWorld, cache: Path) -> None:
        self.tiny, self.cache = tiny, cache
        self.pool = ProcessPool(StageCache(cache, TWO))

    def copy_inputs(self, stage: Stage) -> None:
        for source in stage.get_input_stages().values():
            folder = self.tiny.build(source)
            shutil.copytree(folder, self.pool.stage_cache.locate_folder(source), dirs_exist_ok=True)

    def compute(self, stage: Stage, display: RecordingDisplay | None = None) -> Path | StageFailure:
        self.copy_inputs(stage)
        self.pool.submit_stage(stage, display or RecordingDisplay())
        _, _, outcome = self.pool.wait_for_outcome()
        return outcome if isinstance(outcome, StageFailure) else self.pool.stage_cache.locate_folder(stage)


@pytest.fixture(scope="module")
def two(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagesInTwoProcesses]:
    stages = StagesInTwoProcesses(tiny, tmp_path_factory.mktemp("two"))
    yield stages
    stages.pool.kill_workers()


TIMES = {"seconds", "sampling_seconds", "updating_seconds"}
SLOW = {"learning_rate": 1e-4, "value_learning_rate": 1e-4}
"""Adam divides a gradient by its size, so rounding in what has almost none moves a weight by the learning rate."""
SFT_ROWS = {"learning_rate": 1e-4, "batch_size": 21, "epochs": 2}
"""Of 64 rows in batches of 21 one is left, so one of the processes has none."""


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", SFT_ROWS),
        ("sft", {**SFT_ROWS, "lora": {"rank": 2}}),
        ("reward", {"learning_rate": 1e-4}),
        ("reward", {"learning_rate": 1e-4, "head": "fitted"}),
        ("dpo", {"learning_rate": 1e-4, "batch_size": 7, "lora": {"rank": 2}}),
        ("dpo", {"learning_rate": 1e-4, "policy": "tuned"}),
        ("ppo", {**SLOW, "batch_size": 5, "minibatches": 2, "epochs": 2}),
        ("ppo", {**SLOW, "lora": {"rank": 2}}),
        ("ppo", {**SLOW, "value_init": "shared", "value_warmup_steps": 1}),
        ("ppo", {**SLOW, "advantage": "rloo", "completions_per_prompt": 2}),
        ("samples", {"prompts": 9}),
        ("evaluation", {"prompts": None}),
        ("evaluation", {"prompts": None, "policy": "policy", "best_of": 2}),
        ("gradients", {"pairs": 3}),
    ],
)
def test_a_stage_is_the_same_in_one_process_and_in_two(
    tiny: TinyWorld, two: StagesInTwoProcesses, kind: str, settings: dict[str, Any]
) -> None:
    settings = {key: getattr(tiny, str(value)) if key == "policy" else value for key, value in settings.items()}
    stage = getattr(tiny, kind)(**settings)
    one, other = tiny.run(stage), two.compute(stage)
    assert isinstance(other, Path), other
    assert_same_folders(one, other)


def assert_same_folders(one: Path, other: Path) -> None:
    """Check rows, texts, metrics and weights of two folders of a stage; rounding may differ."""
    rounding = {"rel": 1e-4, "abs": 1e-5}
    files = {str(file.relative_to(folder)) for folder in (one, other) for file in folder.rglob("*") if file.is_file()}
    assert files - {"settings.json"} == {str(file.relative_to(one)) for file in one.rglob("*") if file.is_file()}
    for name in files:
        if name.endswith(".safetensors"):
            weights, expected = load_file(other / name), load_file(one / name)
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
        elif name.endswith(".parquet"):
            for row, expected_row in zip(read_table(other / name), read_table(one / name), strict=True):
                for key, value in expected_row.items():
                    if key == "logprobs":
                        row[key], value = (sum(branches, []) for branches in (row[key], value))
                    is_number = isinstance(value, float) or key in ("scores", "logprobs")
                    assert row[key] == (pytest.approx(value, **rounding) if is_number else value), (name, key)
        elif name in ("completions.jsonl", "samples.jsonl"):
            assert (other / name).read_text() == (one / name).read_text()
    decided_by_rounding = {"accuracy"} if "dpo" in str(other) else set()  # while policy and reference are one
    for step, expected_step in zip(read_metrics(other), read_metrics(one), strict=True):
        keys = expected_step.keys() - TIMES - decided_by_rounding
        assert {key: step[key] for key in keys} == pytest.approx({key: expected_step[key] for key in keys}, **rounding)
    summary, expected_summary = read_stage_summary(other), read_stage_summary(one)
    for key in ("tokens_sampled", "tokens_trained", "tokens_scored", "flops"):
        assert summary["cost"][key] == expected_summary["cost"][key], key


def count_steps(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("kind", ["sft", pytest.param("ppo", marks=pytest.mark.heavy)])
def test_a_stage_goes_on_with_another_number_of_processes(
    tiny: TinyWorld, two: StagesInTwoProcesses, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed in two processes, then stopped in one, and ended in two."""
    settings = {"sft": {"epochs": 30, **SLOW}, "ppo": {**SLOW, "batch_size": 2, "epochs": 3}}[kind]
    settings = {key: value for key, value in settings.items() if kind == "ppo" or key != "value_learning_rate"}
    stage = getattr(tiny, kind)(**settings)
    whole, folder = tiny.run(stage), two.pool.stage_cache.locate_folder(stage)

    class KillingDisplay(RecordingDisplay):
        def on_step(self, done: int, total: int, metrics: object) -> None:
            if done == 3:
                (group,) = two.pool.groups.values()
                group.processes[1].kill()

    with pytest.raises(InputError, match=r"runtime\.processes: found 2, and one of the processes was killed"):
        two.compute(stage, KillingDisplay())
    two.pool.busy.clear()
    assert not two.pool.groups, "the other one is gone too"
    first = count_steps(folder)
    assert 3 <= first < count_steps(whole) - 4

    append = MetricsLog.append_step

    def stop(log: MetricsLog, step: int, *rest: Any) -> None:
        if step == first + 2:
            raise KeyboardInterrupt
        append(log, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append_step", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.compute(stage, folder, TINY_RUNTIME.model_copy(update={"checkpoint_minutes": 0}))
    seconds = [step["seconds"] for step in read_metrics(folder)]
    assert first <= len(seconds) == first + 2
    assert isinstance(two.compute(stage), Path)
    assert [step["seconds"] for step in read_metrics(folder)][: len(seconds)] == seconds, "nothing is computed again"
    assert_same_folders(whole, folder)


def test_a_process_that_raises_or_dies_ends_the_stage_with_its_own_error(two: StagesInTwoProcesses) -> None:
    failure = two.compute(FailingInOne(how="raises"))
    assert isinstance(failure, StageFailure)
    assert "ValueError: it raises (details in " in failure.reason
    trace = (two.pool.stage_cache.locate_folder(FailingInOne(how="raises")) / "failure.txt").read_text()
    assert "In process 2 of 2" in trace
    assert "in compute" in trace
    (group,) = two.pool.groups.values()
    assert group.is_alive
    failure = two.compute(FailingInOne(how="raises alone"))
    assert isinstance(failure, StageFailure)
    assert "ValueError: it raises alone (details in " in failure.reason
    assert not group.is_alive
    with pytest.raises(InputError, match=r"runtime\.processes: found 2, and one of the processes was killed"):
        two.compute(FailingInOne(how="dies"))
    two.pool.busy.clear()
