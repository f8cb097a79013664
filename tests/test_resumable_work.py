"""Resumable work: a killed stage computes only the missing rows, and ends with the same rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixpo.models.samplers import LocalSampler
from mixpo.stages.rows import read_table
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import read_stage_summary
from mixpo.training.job import StageJob
from mixpo.training.record import Cost, MetricsLog, read_jsonl
from mixpo.training.resumable_work import ResumableWork
from mixpo.training.runtime import Runtime
from models import tiny as tiny_model
from worlds import TinyWorld, write_jsonl

ROWS = [[0, 3], [1], [2, 4]]


def squares(rows: list[int]) -> list[int]:
    return [row * row for row in rows]


def test_results_come_in_the_rows_order(tmp_path: Path) -> None:
    done: list[int] = []
    results = ResumableWork(StageJob(tmp_path, SMALL_RUNTIME)).compute_rows(
        "squares", ROWS, squares, report_finished=done.append
    )
    assert results == [0, 1, 4, 9, 16]
    assert done == [2, 1, 2]


@pytest.mark.parametrize("torn", ["", '{"name": "squares", "rows": [1], "resu', '{"name": "squares", "rows": [1]}'])
def test_only_rows_that_are_not_on_disk_are_computed(tmp_path: Path, torn: str) -> None:
    """The last line may be torn anywhere; the next run may cut the rows into other portions."""
    first = ResumableWork(job := StageJob(tmp_path, SMALL_RUNTIME))
    job.cost.tokens_sampled = 7.0
    first.compute_rows("squares", [[0, 3], [2]], squares)
    first.compute_rows("cubes", [[1]], lambda rows: [row**3 for row in rows])
    with (tmp_path / "portions.jsonl").open("a") as file:
        file.write(torn)
    computed: list[int] = []

    def work(rows: list[int]) -> list[int]:
        computed.extend(rows)
        return squares(rows)

    again = ResumableWork(job := StageJob(tmp_path, SMALL_RUNTIME))
    assert job.cost.tokens_sampled == 7.0
    assert again.compute_rows("squares", [[4, 0], [3, 2, 1]], work) == [0, 1, 4, 9, 16]
    assert computed == [4, 1]
    assert again.compute_rows("cubes", [[1]], work) == [1]
    assert len((tmp_path / "portions.jsonl").read_text().splitlines()) == 5
    job.finish_stage()
    assert not (tmp_path / "portions.jsonl").exists()


def test_completions_of_a_prompt_that_comes_again_do_not_follow_the_portions(tmp_path: Path) -> None:
    """An equal prompt is another occurrence wherever it stands: in one portion or in portions of their own."""
    lm, prompts = tiny_model("llama"), [[3, 9, 4], [12, 13], [3, 9, 4], [3, 9, 4], [12, 13]]
    completions_by_budget = []
    for gib in (1e-9, 1.0):
        folder = tmp_path / str(gib)
        folder.mkdir()
        resumable = ResumableWork(StageJob(folder, Runtime(threads=1, sampling_gib=gib)))
        completions, _ = resumable.sample_in_portions(lm, prompts, k=1, max_tokens=8, seed=0)
        completions_by_budget.append([tuple(branches[0]) for branches in completions])
    assert completions_by_budget[0] == completions_by_budget[1]
    assert len(set(completions_by_budget[0])) == len(prompts)
    assert len((tmp_path / "1e-09" / "portions.jsonl").read_text().splitlines()) == len(prompts)


@pytest.mark.parametrize("killed", ["before its last portion", "while it trains"])
def test_the_seconds_of_the_reference_are_those_of_all_processes(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    stage = tiny.dpo(pairs=tiny.pairs.train_pairs, samplings=0)
    tiny.build(tiny.policy)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append_step", die)
        with pytest.raises(KeyboardInterrupt):
            tiny.compute(stage, tmp_path, SMALL_RUNTIME)
    lines = read_jsonl(tmp_path / "portions.jsonl")
    assert all(line["seconds"] > 0 for line in lines)
    saved = lines[: len(lines) - (killed != "while it trains")]
    write_jsonl(tmp_path / "portions.jsonl", [{**line, "seconds": 1000.0} for line in saved])
    tiny.compute(stage, tmp_path, SMALL_RUNTIME)
    seconds = read_stage_summary(tmp_path)["reference_seconds"] - 1000.0 * len(saved)
    assert (seconds == 0.0) == (killed == "while it trains")
    assert seconds >= 0.0


def stages(tiny: TinyWorld) -> dict[str, Callable[[], Stage]]:
    return {
        "samples": lambda: tiny.samples(prompts=None),
        "evaluation": lambda: tiny.evaluation(prompts=None, second=tiny.scored_by),
        "best of": lambda: tiny.evaluation(prompts=None, policy=tiny.policy, best_of=2),
        "gradients": lambda: tiny.gradients(pairs=3),
        "dpo": lambda: tiny.dpo(pairs=tiny.pairs.train_pairs, samplings=0),
    }


PORTIONS = {"samples": 4, "evaluation": 6, "best of": 4, "gradients": 4, "dpo": 2}
"""Portions, at least, of each at the runtime below."""
CACHE = 400 * 512 / 2**30
"""GiB of 400 tokens in two layers of two heads of 16 floats, keys and values."""
SMALL_RUNTIME = Runtime(threads=1, sampling_gib=CACHE, microbatch_tokens=20, checkpoint_minutes=100)


@pytest.mark.parametrize(("kind", "killed_at"), [(kind, line) for kind, n in PORTIONS.items() for line in {2, n}])
def test_a_killed_stage_goes_on_and_ends_with_the_same_rows(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, killed_at: int
) -> None:
    """Killed before its second portion, and before its last, is written."""
    stage = stages(tiny)[kind]()
    for source in stage.get_input_stages().values():
        tiny.build(source)
    sampled_prompts: list[list[list[int]]] = []
    original = LocalSampler.draw

    def sampling(sampler: LocalSampler, prompts: list[list[int]], **settings: Any) -> Any:
        sampled_prompts.append(prompts)
        return original(sampler, prompts, **settings)

    monkeypatch.setattr(LocalSampler, "draw", sampling)
    whole, killed = tiny.compute(stage, tmp_path / "whole", SMALL_RUNTIME), tmp_path / "killed"
    unbroken = list(sampled_prompts)
    counts, calls = Cost.get_counts, []

    def die(cost: Cost) -> dict[str, float]:
        calls.append(cost)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return counts(cost)

    monkeypatch.setattr(Cost, "get_counts", die)
    with pytest.raises(KeyboardInterrupt):
        tiny.compute(stage, killed, SMALL_RUNTIME)
    monkeypatch.setattr(Cost, "get_counts", counts)
    saved = read_jsonl(killed / "portions.jsonl")
    assert len(saved) == killed_at - 1
    sampled_prompts.clear()
    tiny.compute(stage, killed, SMALL_RUNTIME)
    missing = unbroken[sum(line["name"] == "sampled" for line in saved) :]
    assert sampled_prompts == missing, "only what is missing is drawn"
    assert not (killed / "portions.jsonl").exists()
    for file in whole.glob("*.parquet"):
        assert read_table(file) == read_table(killed / file.name)
    one, other = (read_stage_summary(folder) for folder in (whole, killed))
    for summary in (one, other):
        del summary["cost"]["seconds"], summary["cost"]["peak_memory_mib"]
        summary.pop("reference_seconds", None)
    assert one == other
