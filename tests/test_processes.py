"""One stage in two processes: the same rows, losses and weights as in one, and no process that waits for ever."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mixpo.data.branches import pack_branches
from mixpo.data.errors import InputError
from mixpo.experiments.cluster import InfraSettings
from mixpo.experiments.executors import open_executor
from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.results import load_runs, read_evaluation_summary
from mixpo.experiments.run import run_recipe
from mixpo.experiments.workers import ProcessPool, StageFailure, assign_devices
from mixpo.models.adapters import LoraSettings
from mixpo.models.loading import ModelLoader
from mixpo.models.samplers import LocalSampler
from mixpo.models.sampling import sample_completions
from mixpo.models.saving import save_model
from mixpo.models.scoring import compute_token_logprobs
from mixpo.stages.rows import read_table
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_summary
from mixpo.training import parallel
from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.job import CHECKPOINT, StageJob, locate_model_folder
from mixpo.training.parallel import MultiProcessSampler, StageProcesses
from mixpo.training.record import MetricsLog, read_metrics
from mixpo.training.rendezvous import LocalRendezvousStore, Rendezvous, join_rendezvous
from mixpo.training.runtime import Runtime, list_gpu_names
from mixpo.training.sharding import gather_for_passes, gather_for_saving, get_local, get_whole
from mixpo.training.step import Diverged, Microbatch, OptimizerSettings, make_optimizer, take_optimizer_step
from models import tiny as tiny_model
from process_pairs import ProcessPair, StageFailingInOneProcess, start_process_pair
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
        padded = torch.tensor([[float(row)] * row + [0.0] * (longest - row) for row in rows])
        return [padded, torch.tensor([[row] for row in rows])]

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
            [Microbatch(pack_branches([[1]], [[[2]]]), [0])],
            lambda batch, rows: ((factor * weight).sum(), {}),
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
    sampler = MultiProcessSampler(LocalSampler(cache_bytes=1 << 20), processes)
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


def cut_weights(processes: StageProcesses, precision: str) -> Any:
    lm = tiny_model("llama")
    network = lm.network
    network.precision = precision
    expected = {name: weight.clone() for name, weight in network.state_dict().items()}
    prompts, completions = [[3, 9, 4], [12]], [[[7, 8], [9]], [[5], [6, 6, 6]]]
    batch = pack_branches(prompts, completions)
    scored = compute_token_logprobs(lm, prompts, completions, token_budget=100)
    lm(batch, "logprobs").sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in lm.named_parameters()}
    network.zero_grad()

    replace(processes, is_sharded=True).shard(network)
    shares = sum(get_local(weight).numel() for weight in lm.parameters())
    with gather_for_passes(network):
        if processes.rank == 0:  # alone
            again = compute_token_logprobs(lm, prompts, completions, token_budget=100)
            torch.testing.assert_close(again, scored, **CLOSE[precision])
    assert sum(get_local(weight).numel() for weight in lm.parameters()) == shares
    loss = lm(batch, "logprobs").sum() * (2 if processes.rank == 0 else 0)  # the mean over the processes is taken
    loss.backward()
    for name, weight in lm.named_parameters():
        torch.testing.assert_close(get_whole(weight.grad), gradients[name], **CLOSE[precision])
    with gather_for_saving(network, keep=True):
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, expected[name]), name
    return shares, sum(weight.numel() for weight in expected.values())


CLOSE = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}
"""Weights of norms are rounded to bfloat16 where layers are gathered in it."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_cut_and_gathered_where_they_are_needed(pair: ProcessPair, precision: str) -> None:
    first, second = pair.call(cut_weights, precision)
    assert isinstance(first, tuple), first
    assert first[0] + second[0] == first[1]
    assert abs(first[0] - second[0]) < 0.01 * first[1]


def train_from_checkpoint(processes: StageProcesses, folder: Path, offload: bool, last_step: int) -> Any:
    """Weights after training a network, cut if there are two processes, from its checkpoint; which is written then."""
    job = StageJob(folder, Runtime(device="cpu", threads=1), replace(processes, is_sharded=processes.count > 1))
    lm = tiny_model("llama")
    job.processes.shard(lm.network)
    optimizer = make_optimizer(lm.parameters(), OptimizerSettings(learning_rate=1e-3), offload=offload)
    checkpoint = Checkpoint(job, {"weights": TrainableWeights(lm), "optimizer": optimizer})
    first_step, _ = checkpoint.restore_states()
    for step in range(first_step, last_step):
        optimizer.zero_grad()
        (lm(pack_branches([[3, 9, 4 + step]], [[[7, 8], [9, step]]]), "logprobs").sum()).backward()
        optimizer.step()
    checkpoint.write_checkpoint(last_step, {})
    return first_step, {name: get_whole(weight.detach()) for name, weight in lm.named_parameters()}


@pytest.mark.parametrize("offload", [False, True], ids=["adamw", "offloaded"])
def test_a_checkpoint_of_cut_weights_is_read_by_any_number_of_processes(
    pair: ProcessPair, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, offload: bool
) -> None:
    """And every process writes its own parts of weights and moments, on which an offloaded step works as AdamW's."""
    alone = StageProcesses(torch.device("cpu"))
    _, expected = train_from_checkpoint(alone, tmp_path_factory.mktemp("alone"), False, 6)
    (first, _), _ = pair.call(train_from_checkpoint, tmp_path, offload, 2)
    parts = sorted((tmp_path / "checkpoint-2").iterdir())
    assert first == 0
    assert len(parts) == 2
    numbers = sum(weight.numel() for weight in expected.values())
    assert sum(sum(one.numel() for one in load_file(part).values()) for part in parts) == 3 * numbers
    assert sum(one.numel() for one in load_file(parts[0]).values()) < 1.6 * numbers
    assert (tmp_path / CHECKPOINT).stat().st_size < 20_000
    (tmp_path / "checkpoint-2" / ".nfs0001").write_bytes(b"what a file system keeps of a deleted file")
    assert train_from_checkpoint(alone, tmp_path, offload, 3)[0] == 2
    assert not list(tmp_path.glob("checkpoint-*"))
    assert [first for first, _ in pair.call(train_from_checkpoint, tmp_path, offload, 4)] == [3, 3]
    (first, _), _ = pair.call(train_from_checkpoint, tmp_path, not offload, 5)
    assert first == 4
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    for _, weights in pair.call(train_from_checkpoint, tmp_path, offload, 6):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_without_all_parts_is_refused_in_one_line(pair: ProcessPair, tmp_path: Path) -> None:
    alone = StageProcesses(torch.device("cpu"))
    pair.call(train_from_checkpoint, tmp_path, False, 1)
    first, second = sorted((tmp_path / "checkpoint-1").iterdir())
    content = first.read_bytes()

    def read_everywhere() -> Iterator[str]:
        for error in pair.call(train_from_checkpoint, tmp_path, False, 2):
            assert isinstance(error, InputError), error
            yield str(error.args[0])
        with pytest.raises(InputError) as error:
            train_from_checkpoint(alone, tmp_path, False, 2)
        yield str(error.value)

    def break_metadata() -> None:
        save_file(load_file(first), first, {"DCP_SHARDING_INFO": "{"})

    def cut_off() -> None:
        first.write_bytes(content[:-99])

    for damage in (first.unlink, second.unlink, cut_off, lambda: first.write_text(""), break_metadata):
        saved = second.read_bytes()
        damage()
        for message in read_everywhere():
            assert "checkpoint.safetensors: found no checkpoint of this stage (" in message
            assert "\n" not in message
        first.write_bytes(content)
        second.write_bytes(saved)
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert all("delete it to start the stage again" in message for message in read_everywhere())


def write_to_a_full_disk(processes: StageProcesses, folder: Path) -> Any:
    def fail(tensors: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixpo.training.checkpoint.write_shards", fail)
        train_from_checkpoint(processes, folder, False, 3)


def test_folders_of_attempts_that_were_stopped_are_deleted_first_and_not_the_one_in_use(
    pair: ProcessPair, tmp_path: Path
) -> None:
    pair.call(train_from_checkpoint, tmp_path, False, 1)
    for name in ("checkpoint-2", "checkpoint-9"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    assert [type(error) for error in pair.call(write_to_a_full_disk, tmp_path)] == [OSError] * 2
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert [first for first, _ in pair.call(train_from_checkpoint, tmp_path, False, 2)] == [1, 1]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def read_adapters_with_a_whole_module(processes: StageProcesses, folder: Path) -> None:
    replaced = replace(processes, is_sharded=True)
    ModelLoader(processes.device, lambda network: replaced.shard(network)).load_policy(folder)


def test_adapters_with_modules_that_trained_whole_are_refused_where_weights_are_cut(
    pair: ProcessPair, tiny: TinyWorld, tmp_path: Path
) -> None:
    lora = LoraSettings(rank=2, modules_to_save=("norm",))
    folder = locate_model_folder(tiny.build(tiny.base))
    save_model(ModelLoader(torch.device("cpu")).load_trainable_policy(folder, lora=lora), tmp_path / "saved")
    for error in pair.call(read_adapters_with_a_whole_module, tmp_path / "saved"):
        assert str(error.args[0]).startswith("lora.modules_to_save: found some beside runtime.sharded; expected one of")


@pytest.mark.parametrize("output", ["logprobs", "scores", "values"])
def test_what_a_network_computes_is_no_view_of_which_fully_shard_would_warn(tiny: TinyWorld, output: Any) -> None:
    lm = tiny.load(tiny.policy if output == "logprobs" else tiny.scored_by)
    batch = pack_branches([[3, 9, 4], [12]], [[[7, 8], [9]], [[5], [6, 6, 6]]])
    assert not lm(batch, output)._is_view()


TWO = Runtime(device="cpu", threads=1, processes=2, microbatch_tokens=100, sampling_gib=1e-4, checkpoint_minutes=0)


class StagesInTwoProcesses:
    """A pool of one group of two processes, with a cache of its own in which inputs of stages are copied."""

    def __init__(self, tiny: TinyWorld, cache: Path, runtime: Runtime) -> None:
        self.tiny = tiny
        self.pool = ProcessPool(StageCache(cache, runtime))

    def copy_inputs(self, stage: Stage) -> None:
        for source in stage.get_input_stages().values():
            folder = self.tiny.build(source)
            shutil.copytree(folder, self.pool.stage_cache.locate_folder(source), dirs_exist_ok=True)

    def compute(self, stage: Stage, display: RecordingDisplay | None = None) -> Path | StageFailure:
        self.copy_inputs(stage)
        self.pool.submit_stage(stage, display or RecordingDisplay())
        _, _, outcome = self.pool.wait_for_outcome()
        return outcome if isinstance(outcome, StageFailure) else self.pool.stage_cache.locate_folder(stage)


@pytest.fixture(scope="module", params=[False, True], ids=["copied", "cut"])
def two(
    tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[StagesInTwoProcesses]:
    """With weights copied to both processes, and with weights cut over them."""
    runtime = TWO.model_copy(update={"sharded": request.param})
    stages = StagesInTwoProcesses(tiny, tmp_path_factory.mktemp("two"), runtime)
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
                        row[key], value = (list(chain(*branches)) for branches in (row[key], value))
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


@pytest.mark.heavy
def test_cut_weights_with_offloaded_moments_and_checkpointed_activations(tiny: TinyWorld, tmp_path: Path) -> None:
    saving = {"sharded": True, "offload_optimizer": True, "activation_checkpointing": True}
    stages = StagesInTwoProcesses(tiny, tmp_path, TWO.model_copy(update=saving))
    for stage in (tiny.sft(**SFT_ROWS), tiny.ppo(**SLOW), tiny.ppo(**SLOW, lora={"rank": 2})):
        one, other = tiny.run(stage), stages.compute(stage)
        assert isinstance(other, Path), other
        assert_same_folders(one, other)
    stages.pool.kill_workers()


@pytest.mark.heavy
def test_moments_in_8_bits_of_adapters_beside_cut_weights(tiny: TinyWorld, tmp_path: Path) -> None:
    """Of matrices with more than 4096 numbers, which are kept in 8 bits."""
    stages = StagesInTwoProcesses(tiny, tmp_path, TWO.model_copy(update={"sharded": True}))
    stage = tiny.sft(**SFT_ROWS, lora={"rank": 160}, optimizer="adamw-8bit")
    one, other = tiny.run(stage), stages.compute(stage)
    assert isinstance(other, Path), other
    assert_same_folders(one, other)
    stages.pool.kill_workers()


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

    class WorkerKillingDisplay(RecordingDisplay):
        def on_step(self, done: int, total: int, metrics: object) -> None:
            if done == 3:
                (group,) = two.pool.groups.values()
                group.processes[1].kill()

    with pytest.raises(InputError, match=r"runtime\.processes: found 2, and one of the processes was killed"):
        two.compute(stage, WorkerKillingDisplay())
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
    failure = two.compute(StageFailingInOneProcess(how="raises"))
    assert isinstance(failure, StageFailure)
    assert "ValueError: it raises (details in " in failure.reason
    trace = (two.pool.stage_cache.locate_folder(StageFailingInOneProcess(how="raises")) / "failure.txt").read_text()
    assert "In process 2 of 2" in trace
    assert "in compute" in trace
    (group,) = two.pool.groups.values()
    assert group.is_alive
    failure = two.compute(StageFailingInOneProcess(how="raises alone"))
    assert isinstance(failure, StageFailure)
    assert "ValueError: it raises alone (details in " in failure.reason
    assert not group.is_alive
    with pytest.raises(InputError, match=r"runtime\.processes: found 2, and one of the processes was killed"):
        two.compute(StageFailingInOneProcess(how="dies"))
    two.pool.busy.clear()


WORDS = [
    "arms=[dpo]",
    "data.train_rows=64",
    "data.test_rows=16",
    "data.demonstration_rows=64",
    "samples.prompts=16",
    "evaluation.prompts=16",
    "max_completion_tokens=12",
    "runtime.threads=1",
]


@pytest.mark.heavy
def test_the_processes_of_torchrun_compute_a_run_together(tmp_path: Path) -> None:
    alone, places = RecordingDisplay(), [f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}"]
    run_recipe(read_recipe("world", [*WORDS, *places]), alone)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mixpo.cli.main"]
    for words, code, expected in (
        ([], 0, f"{len(alone.started)} stages computed, 0 found in the cache"),
        ([], 0, f"0 stages computed, {len(alone.started)} found in the cache"),
        (["arms=[ppo]", "ppo.max_kl=1e-6", "ppo.batch_size=4", "ppo.warmup_steps=0"], 1, "ran away"),
        (["runtime.processes=2"], 2, "and runtime.processes=2 in one of 2 processes of a launcher (WORLD_SIZE)"),
    ):
        places = [f"cache={tmp_path / 'cache2'}", f"out={tmp_path / f'run{len(words)}'}"]
        ended = subprocess.run([*launch, "run", "-q", *WORDS, *places, *words], capture_output=True, text=True)
        assert expected in ended.stdout + ended.stderr
        assert ended.stdout.count("report: ") == (1 if code < 2 else 0), "one process prints"
        assert bool(ended.returncode) == bool(code)
    one, two = (
        [read_evaluation_summary(arm)["score"]["mean"] for arm in load_runs(tmp_path / name).arms]
        for name in ("run", "run0")
    )
    assert one == pytest.approx(two, abs=1e-3)


@pytest.mark.heavy
def test_the_papers_recipe_runs_in_two_processes_with_another_model_and_sizes(tiny: TinyWorld, tmp_path: Path) -> None:
    rows = [f"data.{part}=[{tiny.folder / 'train.jsonl'}]" for part in ("train", "test")]
    sizes = ["data.train_rows=14", "data.test_rows=6", "evaluation.prompts=4", "data.max_prompt_tokens=96"]
    sizes += ["max_completion_tokens=12", "selection={threshold: null, easy_fraction: 0.5}"]  # whatever the scores are
    words = [f"model.path={tiny.folder / 'base'}", *rows, *sizes, "runtime.device=cpu", "runtime.processes=2"]
    recipe = read_recipe("hh-rlhf", [*words, f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}"])
    assert (recipe.runtime.sharded, recipe.ppo.batch_size, recipe.precision) == (True, 64, "bfloat16")
    display = RecordingDisplay()
    run_recipe(recipe, display)
    assert not display.failures
    assert [(arm.arm, arm.status) for arm in load_runs(tmp_path / "run").arms] == [
        (name, "done") for name in ("sft", "dpo-base", "dpo", "ppo", "mpo")
    ]
    assert not any(note.startswith("runtime.sharded: every stage has one process") for note in display.notes)


def meet(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[Rendezvous | None, dict[str, str]]:
    """Join the rendezvous of these variables, but its store; returns it and torchrun's variables as they then are."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SUBMITIT_EXECUTOR")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # so that it is taken back
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        found: dict[str, str] = {}

        def open_store(_: str) -> Iterator[tuple[None, int, int]]:
            found.update({name: os.environ[name] for name in names[:-1]})
            yield None, int(found["RANK"]), int(found["WORLD_SIZE"])

        patch.setattr("mixpo.training.rendezvous.rendezvous", open_store)
        return join_rendezvous.__wrapped__(), found


def test_a_launchers_variables_say_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own, and those of a Slurm step, whose first node is the place."""
    assert meet(monkeypatch, {})[0] is None
    torchrun = LocalRendezvousStore().make_environment(1, 3)
    meeting, _ = meet(monkeypatch, torchrun)
    assert meeting is not None
    assert (meeting.rank, meeting.count, meeting.local_rank) == (1, 3, 1)

    numbers = {"JOB_ID": 7, "STEP_NUM_TASKS": 4, "NTASKS": 4, "PROCID": 3, "LOCALID": 1, "JOB_NUM_NODES": 2}
    slurm = {f"SLURM_{name}": str(value) for name, value in numbers.items()}
    slurm["SLURM_JOB_NODELIST"] = "node[01-02]"
    meeting, found = meet(monkeypatch, slurm)
    assert meeting is not None
    assert (meeting.rank, meeting.count, meeting.local_rank) == (3, 4, 1)
    assert found["MASTER_ADDR"] == "node01"
    assert meet(monkeypatch, {**slurm, "SLURM_PROCID": "0"})[1]["MASTER_PORT"] == found["MASTER_PORT"]
    del slurm["SLURM_STEP_NUM_TASKS"]
    assert meet(monkeypatch, slurm)[0] is None, "a batch script is one process, whatever its allocation"
    meeting, _ = meet(monkeypatch, {**slurm, "SLURM_STEP_NUM_TASKS": "2", **torchrun})
    assert meeting is not None
    assert meeting.count == 3, "torchrun in a step"


def test_stages_on_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert assign_devices(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3"]
    assert assign_devices(["GPU-a", "GPU-b"], 1) == ["GPU-a", "GPU-b"]
    assert assign_devices([], 1) == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    opening = open_executor(StageCache(tmp_path, Runtime(workers="gpus")), InfraSettings(), tmp_path)
    with pytest.raises(InputError, match=r"runtime\.workers: found gpus; .* torch finds none here; set"), opening:
        pass
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_gpu_names() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-b,7,-1,9")
    assert list_gpu_names() == ["5", "GPU-b", "7"]
    assert Runtime(workers="gpus").count_workers() == 3
    assert Runtime(workers="gpus", processes=2).count_workers() == 1
    with pytest.raises(InputError, match=r"expected at least 4 for a stage .* torch finds 3 here"):
        Runtime(workers="gpus", processes=4).count_workers()
    with pytest.raises(InputError, match="a device other than cpu"):
        Runtime(workers="gpus", device="cpu").count_workers()


def test_every_worker_sees_its_own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With four GPUs that are not there: what processes would see stands in the environment that they start with."""
    seen: list[tuple[str | None, str | None]] = []

    class FakeProcess:
        sentinel = 0

        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            seen.append((os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("RANK")))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", FakeProcess)
    for processes, expected in ((1, [("0", None), ("1", None)]), (2, [("0,1", "0"), ("0,1", "1"), ("2,3", "0")])):
        pool = ProcessPool(StageCache(tmp_path, Runtime(workers="gpus", processes=processes)))
        seen.clear()
        first, _ = pool._start_group(), pool._start_group()
        assert seen[: len(expected)] == expected
        del pool.groups[first.pipe]
        assert pool._start_group().devices == first.devices, "a group that was lost leaves its devices to the next"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
