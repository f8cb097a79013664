"""The stages on a small world: what they leave behind, that nothing is computed twice, and exact resume."""

import fcntl
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixpo import SFT, Data, Evaluation, Pretrained, RewardModel, Selection, StageCache
from mixpo.algorithms.preference import dpo_loss
from mixpo.data.branches import Completions, pack_branches
from mixpo.data.errors import InputError
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.tokens import compute_tokenization_digest, decode_completion, tokenize_prompt
from mixpo.data.world import build_world_tokenizer
from mixpo.models import loading, scoring
from mixpo.models.adapter_folders import WEIGHTS, holds_adapters, read_adapter_folder
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.samplers import LocalSampler
from mixpo.models.sampling import SampledCompletions, sample_completions
from mixpo.models.scoring import compute_scores, compute_sequence_logprobs, retokenize_for_reward
from mixpo.stages import dpo as dpo_module
from mixpo.stages import evaluation as evaluation_module
from mixpo.stages import ppo as ppo_module
from mixpo.stages import samples as samples_module
from mixpo.stages.gradients import Gradients
from mixpo.stages.label_noise import LabelNoise
from mixpo.stages.ppo_models import make_actor_critic
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.stages.rows import (
    add_token_columns,
    read_pairs,
    read_table,
    read_tokenized_rows,
    read_unique_prompts,
    write_table,
)
from mixpo.stages.stage import Snapshot, Stage
from mixpo.stages.stage_cache import read_stage_settings, read_stage_summary, sort_topologically
from mixpo.training.checkpoint import LastGoodWeights, TrainableWeights
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.parallel import StageProcesses
from mixpo.training.record import MetricsLog, progress_listener, read_metrics
from mixpo.training.runtime import Runtime
from mixpo.training.step import Diverged
from models import Row, sample_of_rows
from worlds import CPU, HH, LIMIT, RUNTIME, SHORT, TINY_LIMIT, TINY_RUNTIME, TinyWorld, World, write_jsonl


@pytest.fixture
def watching() -> Iterator[Mock]:
    """The listener to the progress of the test's stages."""
    listener = Mock()
    token = progress_listener.set(listener)
    yield listener
    progress_listener.reset(token)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = locate_model_folder(folder)
    return load_file(model / (WEIGHTS if holds_adapters(model) else "model.safetensors"))


def test_sft_learns_and_leaves_a_plain_folder(world: World) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = world.build(world.sft)
    losses = [row["loss"] for row in read_metrics(folder)]
    assert losses[0] == pytest.approx(math.log(1024), abs=0.3)
    assert losses[-1] < 0.8 * losses[0]
    summary = read_stage_summary(folder)
    assert summary["cost"]["tokens_trained"] > 0
    assert summary["model"] == compute_model_digest(locate_model_folder(folder))
    model = AutoModelForCausalLM.from_pretrained(locate_model_folder(folder))
    tokenizer = AutoTokenizer.from_pretrained(locate_model_folder(folder))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert read_stage_settings(folder) == world.sft.model_dump(mode="json")
    assert not list(folder.glob("checkpoint*"))


def test_sft_that_diverges_raises_an_alarm(tiny: TinyWorld, watching: Mock) -> None:
    summary = read_stage_summary(tiny.run(tiny.sft(learning_rate=3.0, warmup_steps=0, epochs=2)))
    (alarm,) = summary["alarms"]
    expected = r"the loss rose from 6\.9\d? to .*: training diverged; try a lower learning_rate \(now 3\)"
    assert re.fullmatch(expected, alarm)
    watching.on_message.assert_any_call(f"alarm: {alarm}")
    assert read_stage_summary(tiny.build(tiny.policy))["alarms"] == []


def replaced(file: Path) -> None:
    """Other weights of the same size."""
    tensors = load_file(file)
    save_file({name: -tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [replaced, torn])
@pytest.mark.parametrize(("kind", "of"), [("reward", "policy"), ("dpo", "policy"), ("samples", "scored_by")])
def test_a_cached_model_that_is_not_what_its_stage_wrote_is_refused(
    tiny: TinyWorld, tmp_path: Path, kind: str, of: str, damage: Callable[[Path], None]
) -> None:
    """By each way to load one; before anything is computed."""
    stage = getattr(tiny, kind)(**({"pairs": tiny.pairs.train_pairs} if kind == "dpo" else {}))
    stage_cache = StageCache(tmp_path, TINY_RUNTIME)
    for upstream in sort_topologically(stage):
        if upstream != stage:
            shutil.copytree(tiny.build(upstream), stage_cache.locate_folder(upstream))
    source = stage_cache.locate_folder(getattr(tiny, of))
    expected = read_stage_summary(source)["model"]
    damage(locate_model_folder(source) / "model.safetensors")
    with pytest.raises(InputError) as refused:
        stage_cache.compute_stage(stage)
    assert re.fullmatch(
        rf"{locate_model_folder(source)}: "
        rf"found files with digest [0-9a-f]{{16}}; expected {expected}, as in the summary.json "
        rf"of the stage that wrote them: .*; delete {source} to compute the stage again",
        str(refused.value),
    )
    assert {file.name for file in stage_cache.locate_folder(stage).iterdir()} == {"settings.json"}


def test_reward_model_orders_pairs(world: World) -> None:
    summary = read_stage_summary(world.build(world.reward))
    assert summary["validation"]["pairs"] == round(0.05 * 256)
    assert sum(row["count"] for row in summary["test"]["by_gap"]) == summary["test"]["pairs"] == 48
    assert summary["test"]["accuracy"] > 0.5


def test_samples_keep_the_samplers_logprobs(world: World) -> None:
    folder = world.build(world.samples)
    lm = world.load(world.sft)
    rows = read_table(folder / "pairs.parquet")
    assert len(rows) == 64
    prompts = read_pairs(folder / "pairs.parquet", lm, max_completion_tokens=LIMIT).prompts
    computed = compute_sequence_logprobs(lm, prompts, [row["tokens"] for row in rows], token_budget=4096)
    stored = torch.tensor([[sum(logprobs) for logprobs in row["logprobs"]] for row in rows])
    torch.testing.assert_close(stored, computed, rtol=1e-4, atol=1e-3)


def test_selection_is_a_partition_with_the_chosen_first(world: World) -> None:
    folder = world.build(world.selection)
    easy, hard = (read_table(folder / f"{name}.parquet") for name in ("easy", "hard"))
    everything = read_table(world.build(world.samples) / "pairs.parquet")
    assert sorted(map(str, easy + hard)) == sorted(map(str, everything))
    assert len(everything) == 64
    assert min(row["gap"] for row in easy) > max(row["gap"] for row in hard)
    for row in everything:
        assert row["scores"][0] >= row["scores"][1]
        assert row["gap"] == pytest.approx(row["scores"][0] - row["scores"][1], abs=1e-6)
    identical = [row for row in everything if row["tokens"][0] == row["tokens"][1]]
    assert all(row["gap"] == 0.0 for row in identical)


def test_identical_completions_have_no_gap_whatever_rounding_made_of_their_scores(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.build(world.reward)

    def compute_scores(reward: Any, prompts: list[Any], completions: list[Any], **_: Any) -> torch.Tensor:
        return torch.tensor([[0.25, 0.5]]).repeat(len(prompts), 1)

    def draw_subset(sampler: LocalSampler, prompts: list[Any], **_: Any) -> SampledCompletions:
        """The same twice for every third prompt."""
        rows = [Row([[5, 6], [5, 6 + (n % 3 > 0)]], [[-1.0, -1.0]] * 2) for n in range(len(prompts))]
        return sample_of_rows(rows, ())

    monkeypatch.setattr(samples_module, "compute_scores", compute_scores)
    monkeypatch.setattr(LocalSampler, "draw", draw_subset)
    world.compute(world.samples, tmp_path)
    rows = read_table(tmp_path / "pairs.parquet")
    identical_rows = [row for row in rows if row["tokens"][0] == row["tokens"][1]]
    assert (len(identical_rows), len(rows)) == (22, 64)
    assert {row["gap"] for row in identical_rows} == {0.0}
    assert {row["gap"] for row in rows if row not in identical_rows} == {0.25}
    assert {tuple(row["scores"]) for row in rows} == {(0.5, 0.25)}
    assert read_stage_summary(tmp_path)["identical"] == len(identical_rows)


@pytest.mark.parametrize("empty", ["easy", "hard"])
def test_selection_refuses_a_threshold_that_leaves_nothing(world: World, empty: str) -> None:
    samples = world.build(world.samples)
    gaps = [abs(one - other) for one, other in (row["scores"] for row in read_table(samples / "pairs.parquet"))]
    threshold = {"easy": max(gaps), "hard": min(gaps) / 2}[empty]
    with pytest.raises(InputError, match=rf"selection.threshold: .* leaves no {empty} pair; the gaps run from"):
        world.stage_cache.compute_stage(Selection(samples=world.samples, threshold=threshold))


@pytest.fixture
def counted(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs went through the reference, call by call, from here on."""
    counts: list[int] = []
    original = dpo_module.compute_sequence_logprobs

    def count_pairs(lm: Any, prompts: Any, completions: Any, **settings: Any) -> torch.Tensor:
        counts.append(len(prompts))
        return original(lm, prompts, completions, **settings)

    world.build(world.selection)
    monkeypatch.setattr(dpo_module, "compute_sequence_logprobs", count_pairs)
    return counts


def test_dpo_prefers_the_chosen_and_takes_reference_logprobs_from_sampling(world: World, counted: list[int]) -> None:
    folder = world.build(world.dpo(epochs=4))
    rows = read_metrics(folder)
    assert counted == [dpo_module.CHECKED_PAIRS], "only a few pairs are checked, the rest is free"
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert rows[0]["margin"] == pytest.approx(0.0, abs=0.01)
    assert rows[-1]["accuracy"] > 0.8
    assert rows[-1]["margin"] > rows[0]["margin"]
    assert "sampled_end_rate" in rows[-1]
    assert (folder / "samples.jsonl").exists()


def test_dpo_computes_reference_logprobs_that_were_kept_in_another_precision(world: World, counted: list[int]) -> None:
    rows = read_metrics(world.build(world.dpo(precision="bfloat16")))
    assert counted == [len(read_table(world.build(world.selection) / "easy.parquet"))]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.01)


def test_a_fitted_head_starts_where_a_random_one_has_to_come(world: World) -> None:
    def first_losses(**settings: Any) -> float:
        stage = world.reward.model_copy(update={"learning_rate": 1e-6, "center_coef": 0.0, **settings})
        rows = read_metrics(world.build(stage))
        return sum(row["loss"] for row in rows[:4]) / 4

    fitted = first_losses(head="fitted")
    assert fitted < math.log(2) - 0.02 < first_losses()
    assert fitted < first_losses(head="fitted", head_ridge=1e4) == pytest.approx(math.log(2), abs=0.01)


def test_dpo_refuses_kept_logprobs_that_are_not_the_references(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.build(world.selection)
    monkeypatch.setattr(
        dpo_module, "compute_sequence_logprobs", lambda lm, prompts, *_, **__: torch.zeros(len(prompts), 2)
    )
    with pytest.raises(RuntimeError, match="from sampling differ from a forward pass"):
        world.stage_cache.compute_stage(world.dpo(seed=77))


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_ppo_starts_at_its_reference_and_raises_the_score(
    world: World, advantage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The score here is for short completions, which a few iterations learn with room to spare on any processor."""

    def shortness(reward: Any, prompts: Any, completions: Completions, **_: Any) -> torch.Tensor:
        return 2.0 - completions.lengths / 8

    monkeypatch.setattr(ppo_module, "compute_scores", shortness)
    group = {} if advantage == "gae" else {"completions_per_prompt": 4, "batch_size": 8}
    steps = {"epochs": 4, "learning_rate": 6e-4, "kl_coef": 0.0, "max_kl": 100.0}
    stage = world.ppo(advantage=advantage, prompts=world.samples.pairs, **steps, **group)
    rows = read_metrics(world.compute(stage, tmp_path / "ppo"))
    assert rows[0]["kl_abs_per_token"] < 1e-4
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["clip_fraction"] == 0.0
    third = len(rows) // 3
    assert sum(row["score"] for row in rows[-third:]) > sum(row["score"] for row in rows[:third]) + 0.5 * third
    assert rows[-1]["kl"] > 0
    assert ("value_explained_variance" in rows[0]) == (advantage == "gae")


def test_the_reward_that_is_trained_on_is_the_score_minus_the_logged_kl(world: World) -> None:
    rows = read_metrics(world.build(world.ppo(score_clip=None, kl_coef=0.3, seed=5, epochs=4)))
    assert abs(rows[-1]["kl"]) > 0.05
    for row in rows:
        assert row["reward"] == pytest.approx(row["score"] - 0.3 * row["kl"], abs=1e-4)


def test_a_completion_without_its_end_is_penalised(world: World) -> None:
    stage = world.ppo(score_clip=None, missing_end_penalty=4.0, seed=6)
    cut = stage.model_copy(update={"max_completion_tokens": 12})
    for row in read_metrics(world.build(cut)):
        assert row["end_rate"] < 1.0
        expected = row["score"] - row["kl_coef"] * row["kl"] - 4.0 * (1.0 - row["end_rate"])
        assert row["reward"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value_init", ["reward", "shared"])
def test_only_the_value_model_learns_while_it_warms_up(world: World, value_init: str) -> None:
    stage = world.ppo(value_init=value_init, value_warmup_steps=99, seed=7)
    before, after = weights(world.build(world.sft)), weights(world.build(stage))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len({row["value_loss"] for row in read_metrics(world.build(stage))}) > 1


def test_deepspeed_chat_preset_and_keys_beside_it() -> None:
    preset = PPOSettings(preset="deepspeed-chat", clip=0.1)
    assert (preset.whiten_advantages, preset.epochs_per_batch, preset.score_clip) == (False, 1, 5.0)
    assert (preset.gae_lambda, preset.discount, preset.warmup_steps, preset.clip) == (0.95, 1.0, 100, 0.1)


@pytest.mark.parametrize("value_init", ["reward", "policy", "shared"])
def test_value_model_starts_where_it_says(world: World, tmp_path: Path, value_init: str) -> None:
    stage = world.ppo(value_init=value_init)
    folders = {name: world.build(source) for name, source in stage.get_input_stages().items()}
    policy = ModelLoader(CPU).load_trainable_policy(locate_model_folder(folders["policy"]))
    reward = ModelLoader(CPU).load_reward_model(locate_model_folder(folders["reward"]))
    learner = make_actor_critic(stage, folders, policy, reward, StageJob(tmp_path, RUNTIME))
    assert learner.value is not None
    assert learner.shares_network == (value_init == "shared")
    if value_init == "reward":
        assert torch.equal(learner.value.score_head.weight, reward.score_head.weight)
        assert learner.value.score_head is not reward.score_head
    assert (world.build(stage) / "model").exists()


def test_ppo_stops_on_a_kl_that_runs_away_and_keeps_the_last_policy(world: World) -> None:
    stage = world.ppo(learning_rate=0.03, kl_coef=0.0, epochs=8, max_kl=0.3)
    expected = r"step \d+ of \d+: the KL to the reference ran away: .* more than max_kl = 0.3.*lower"
    with pytest.raises(Diverged, match=expected):
        world.build(stage)
    stopped = ModelLoader(CPU).load_policy(world.stage_cache.locate_folder(stage) / "stopped")
    reference = world.load(world.sft)
    prompts = read_pairs(world.build(world.selection) / "hard.parquet", stopped, max_completion_tokens=LIMIT).prompts
    sampled = sample_completions(stopped, prompts, k=4, max_tokens=LIMIT, seed=0)
    reference_logprobs = compute_sequence_logprobs(reference, prompts, sampled, token_budget=4096)
    kl = sampled.logprobs.sum() - reference_logprobs.sum()
    assert kl / sampled.mask.sum() < 0.3, "the last policy within max_kl"
    assert not world.stage_cache.is_done(stage)


def test_the_last_good_weights_are_copied_as_often_as_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: each copy takes one second, so the next is due a hundred seconds later."""
    model, now = torch.nn.Linear(3, 2), [0.0]

    class WeightsCopiedInOneSecond(TrainableWeights):
        def state_dict(self) -> dict[str, Any]:
            now[0] += 1.0
            return super().state_dict()

    monkeypatch.setattr("mixpo.training.checkpoint.time.monotonic", lambda: now[0])
    last_good, copied = LastGoodWeights(WeightsCopiedInOneSecond(model), StageProcesses(torch.device("cpu"))), {}
    for step, time in enumerate((0, 50, 100, 101, 300)):
        now[0] = float(time)
        last_good.copy_if_cheap(step)
        copied[step] = last_good.step
        with torch.no_grad():
            model.weight.fill_(float(step + 1))
    assert copied == {0: 0, 1: 0, 2: 0, 3: 3, 4: 4}
    last_good.restore()
    assert model.weight.unique().tolist() == [4.0]


def test_ppo_refuses_a_reference_that_is_not_what_it_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ppo_module.compute_token_logprobs
    monkeypatch.setattr(ppo_module, "compute_token_logprobs", lambda *args, **kwargs: original(*args, **kwargs) + 0.1)
    with pytest.raises(RuntimeError, match="found log-probs of policy and reference that differ by"):
        world.build(world.ppo(seed=78))


def test_ppo_with_lora_keeps_the_reference_it_was_given(world: World) -> None:
    """The start is a DPO model: with adapters on top, the KL at step 0 is 0 to the DPO model and not to its base."""
    anchor = world.dpo(epochs=4)
    stage = world.ppo(policy=anchor, reference=anchor, lora={"rank": 4})
    rows = read_metrics(world.build(stage))
    assert rows[0]["kl_abs_per_token"] < 1e-4
    adapters = read_adapter_folder(locate_model_folder(world.build(stage)))
    assert adapters.base == locate_model_folder(world.build(anchor)).resolve()
    assert any(weight.any() for name, weight in adapters.weights.items() if name.endswith("lora_B"))


def test_kl_from_sft_is_measured_from_sft_whatever_the_reference_is(world: World) -> None:
    anchor = world.dpo(epochs=4)
    one, other = (read_metrics(world.build(world.ppo(policy=anchor, reference=r))) for r in (anchor, world.sft))
    assert abs(one[0]["kl"]) < 0.01
    assert one[0]["kl_from_sft"] == pytest.approx(other[0]["kl_from_sft"], abs=1e-4) == other[0]["kl"]
    assert one[0]["kl_from_sft"] > 0.05


@pytest.mark.heavy
def test_a_kl_budget_holds_the_kl_from_sft_with_another_reference(world: World) -> None:
    anchor = world.dpo(epochs=4)
    common = {"epochs": 12, "kl_coef": 0.01, "learning_rate": 3e-4, "score_clip": None, "prompts": world.samples.pairs}
    free = read_metrics(world.build(world.ppo(**common, policy=anchor, reference=anchor)))
    held = read_metrics(world.build(world.ppo(**common, kl_budget=1.0, policy=anchor, reference=anchor)))

    def end(rows: list[dict[str, Any]]) -> float:
        return sum(row["kl_from_sft"] for row in rows[-12:]) / 12

    assert end(free) > 2.0
    assert end(held) == pytest.approx(1.0, abs=0.4)
    assert max(row["kl_coef"] for row in held) > 0.02, "beyond the budget SFT pulls"


def test_snapshots_are_the_policies_on_the_way(world: World, tmp_path: Path) -> None:
    stage = world.ppo(epochs=2, snapshots=3)
    folder = world.build(stage)
    summary = read_stage_summary(folder)
    assert summary["steps"] == 4
    assert summary["snapshots"] == [1, 2, 3]
    plain = read_stage_summary(world.build(world.ppo(epochs=2)))
    assert summary["model"] == plain["model"], "keeping them changes nothing"
    one, other = (load_file(folder / "snapshots" / str(n) / "model" / "model.safetensors") for n in (1, 3))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    evaluated = evaluation(world, Snapshot(stage=stage, number=1))
    folders = {**dict.fromkeys(evaluated.get_input_stages(), tmp_path), "policy": folder}
    assert evaluated.locate_inputs(folders)["policy"] == folder / "snapshots" / "1"
    assert read_stage_summary(world.build(evaluated))["kl_from_sft"]["mean"] > 0
    with pytest.raises(InputError, match=r"trace.snapshots: found 4 for 4 iterations of PPO; expected fewer"):
        world.build(world.ppo(epochs=2, snapshots=4))


def test_lora_snapshots_are_adapters_and_training_goes_on(world: World) -> None:
    folder = world.build(world.ppo(epochs=2, snapshots=1, lora={"rank": 4}))
    plain = world.build(world.ppo(epochs=2, lora={"rank": 4}))
    assert read_stage_summary(folder)["model"] == read_stage_summary(plain)["model"]
    snapshot, end = weights(folder / "snapshots" / "1"), weights(folder)
    assert snapshot.keys() == end.keys()
    assert any(not torch.equal(snapshot[key], end[key]) for key in end)


def test_a_part_of_an_epoch(world: World) -> None:
    rows = read_metrics(world.build(world.ppo(epochs=1.5)))
    assert len(rows) == 3


def test_ppo_cannot_truncate_the_distribution_it_learns_from(world: World) -> None:
    for key in ("temperature", "top_p", "top_k"):
        with pytest.raises(ValueError, match=key):
            world.ppo(**{key: 0.9})


def evaluation(world: World, policy: Stage | Snapshot, **settings: Any) -> Evaluation:
    common = {"sft": world.sft, "reward": world.reward, "data": world.data, "max_completion_tokens": LIMIT}
    return Evaluation(policy=policy, **{**common, **settings})


def test_best_of_n_is_the_best_of_n(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.build(evaluation(world, world.sft))
    record, draw = list[SampledCompletions](), LocalSampler.draw
    monkeypatch.setattr(LocalSampler, "draw", lambda *args, **how: record.append(draw(*args, **how)) or record[-1])
    best = world.build(evaluation(world, world.sft, best_of=8))
    summary = read_stage_summary(best)
    assert summary["score"]["mean"] > read_stage_summary(one)["score"]["mean"] + 0.1
    assert summary["kl_from_sft"]["mean"] == pytest.approx(math.log(8) - 7 / 8)
    assert summary["cost"]["tokens_sampled"] > 6 * read_stage_summary(one)["cost"]["tokens_sampled"]
    lm = world.load(world.sft)
    reward = world.load(world.reward)
    rows = read_table(best / "completions.parquet")
    prompts = [tokenize_prompt(lm.tokenizer, row["prompt"]) for row in rows]
    sampled = record[0].to_lists()

    def assert_best(rows: list[dict[str, Any]], computed_scores: torch.Tensor) -> None:
        """The highest score is that of what was kept; rounding may choose between two that score alike."""
        for row, completions, each in zip(rows, sampled, computed_scores.tolist(), strict=True):
            texts = [decode_completion(lm.tokenizer, completion) for completion in completions]
            assert max(each) == pytest.approx(each[texts.index(row["completion"])], abs=1e-4)

    computed_scores = compute_scores(reward, prompts, sampled, token_budget=4096)
    assert_best(rows, computed_scores)
    assert [row["score"] for row in rows] == pytest.approx(computed_scores.amax(dim=1).tolist(), abs=1e-4)
    other = world.reward.model_copy(update={"center_coef": 1.0})
    chosen_by_other = world.build(evaluation(world, world.sft, best_of=8, chooser=other))
    other_rows = read_table(chosen_by_other / "completions.parquet")
    sampled = record[1].to_lists()
    other_model = world.load(other)
    assert_best(other_rows, compute_scores(other_model, prompts, sampled, token_budget=4096))
    assert [row["completion"] for row in other_rows] != [row["completion"] for row in rows]
    with pytest.raises(InputError, match="with another policy than SFT"):
        world.build(evaluation(world, world.dpo(epochs=4), best_of=2))


@pytest.mark.parametrize("chosen_by", ["the reward model", "itself", "another"])
def test_best_of_n_scores_no_completion_twice(tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch, chosen_by: str) -> None:
    """And gives what scoring the kept ones alone gives."""
    calls = list[tuple[list[Any], torch.Tensor]]()

    def scoring(reward: Any, prompts: Any, completions: Any, **how: Any) -> torch.Tensor:
        calls.append((completions, compute_scores(reward, prompts, completions, **how)))
        return calls[-1][1]

    monkeypatch.setattr(evaluation_module, "compute_scores", scoring)
    choosers = {"the reward model": None, "itself": tiny.scored_by, "another": tiny.reward(seed=5)}
    folder = tiny.run(tiny.evaluation(policy=tiny.policy, best_of=3, chooser=choosers[chosen_by]))
    sides = [len(branches) for completions, _ in calls for branches in completions]
    assert sides == [3] * 8 + ([1] * 8 if chosen_by == "another" else [])
    written_scores = [row["score"] for row in read_table(folder / "completions.parquet")]
    completions, computed_scores = calls[0]
    places = computed_scores.argmax(dim=1).tolist()
    best = [[branches[place]] for branches, place in zip(completions, places, strict=True)]
    lm = tiny.load(tiny.policy)
    reward = tiny.load(tiny.scored_by)
    prompts = [tokenize_prompt(lm.tokenizer, row["prompt"]) for row in read_table(folder / "completions.parquet")]
    alone = compute_scores(reward, prompts, best, token_budget=4096)[:, 0].tolist()
    assert written_scores == pytest.approx(alone, abs=1e-5)


def test_the_initial_model_is_checked_in_the_type_of_its_file(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a policy and as a reward model: four bytes a weight are twice what a large model's file takes."""
    loaded, wrap = [], loading.Network

    def record(model: Any, **options: Any) -> Any:
        loaded.append((type(model).__name__, {weight.dtype for weight in model.parameters()}))
        return wrap(model, **options)

    monkeypatch.setattr(loading, "Network", record)
    tiny.compute(Pretrained(path=tiny.base.path, dtype="bfloat16"), tmp_path)
    names = ["LlamaForCausalLM", "LlamaForSequenceClassification"]
    assert loaded == [(name, {torch.bfloat16}) for name in names]


def test_figures_of_a_reward_model_are_those_of_the_saved_one(tiny: TinyWorld) -> None:
    """Saved in bfloat16, it is another than the one that was trained in float32."""
    base = Pretrained(path=tiny.base.path, dtype="bfloat16")
    stage = RewardModel(policy=base, pairs=tiny.pairs.train_pairs, data=tiny.pairs, learning_rate=0.01, **SHORT)
    folder = tiny.run(stage)
    saved = ModelLoader(CPU).load_reward_model(locate_model_folder(folder))
    assert saved.dtype == torch.bfloat16
    test = read_pairs(tiny.build(tiny.pairs) / "test.parquet", saved, max_completion_tokens=TINY_LIMIT)
    computed_scores = compute_scores(saved, test.prompts, test.completions, token_budget=TINY_RUNTIME.microbatch_tokens)
    rows = read_table(folder / "test_scores.parquet")
    written = torch.tensor([[row["chosen_score"], row["rejected_score"]] for row in rows])
    torch.testing.assert_close(written, computed_scores, rtol=1e-5, atol=1e-5)
    assert read_stage_summary(folder)["test"]["score_mean"] == pytest.approx(float(computed_scores.mean()), abs=1e-5)


def test_a_second_reward_model_scores_the_same_completions(world: World) -> None:
    data = Data(base=world.base, train_rows=128, second_rows=128, test_rows=48, demonstration_rows=256)
    rows = {name: read_table(world.build(data) / f"{name}.parquet") for name in ("train", "second", "test")}
    prompts = {name: {str(row["prompt"]) for row in part} for name, part in rows.items()}
    assert (len(rows["train"]), len(rows["second"]), len(rows["test"])) == (128, 128, 48)
    assert not prompts["second"] & (prompts["train"] | prompts["test"])
    second = world.reward.model_copy(update={"pairs": data.second_pairs})
    folder = world.build(evaluation(world, world.sft, second=second))
    alone = read_table(world.build(evaluation(world, world.sft)) / "completions.parquet")
    swapped = read_table(world.build(evaluation(world, world.sft, reward=second)) / "completions.parquet")
    for row, first, other in zip(read_table(folder / "completions.parquet"), alone, swapped, strict=True):
        assert row["completion"] == first["completion"]
        assert (row["score"], row["second_score"]) == (first["score"], other["score"])


def test_label_noise_flips_a_share_and_more_of_it_flips_the_same_and_others(world: World) -> None:
    clean = read_table(world.build(world.data) / "train.parquet")
    flipped: dict[float, set[int]] = {}
    for share in (0.1, 0.3):
        folder = world.build(LabelNoise(pairs=world.data.train_pairs, share=share))
        rows = read_table(folder / "train.parquet")
        assert len(rows) == len(clean)
        flipped[share] = {n for n, (row, old) in enumerate(zip(rows, clean, strict=True)) if row != old}
        assert read_stage_summary(folder)["flipped"] == len(flipped[share]) == round(share * len(clean))
        for n in flipped[share]:
            old = clean[n]
            sides = {"chosen": old["rejected"], "rejected": old["chosen"], "tokens": old["tokens"][::-1]}
            assert rows[n] == {**old, **sides}
    assert flipped[0.1] < flipped[0.3]
    other = read_table(world.build(LabelNoise(pairs=world.data.train_pairs, share=0.1, seed=1)) / "train.parquet")
    assert {n for n, (row, old) in enumerate(zip(other, clean, strict=True)) if row != old} != flipped[0.1]


def test_gradients_are_those_of_a_step(world: World) -> None:
    """A small step of plain gradient descent moves both log-probs as the kept inner products say."""
    policy = world.dpo(epochs=4)
    settings = {"pairs": world.selection.easy_pairs, "beta": 0.1, "count": 3, "max_completion_tokens": LIMIT}
    folder = world.build(Gradients(policy=policy, reference=world.sft, **settings))
    rows = read_table(folder / "gradients.parquet")
    assert len(rows) == 3
    row = rows[0]
    lm = ModelLoader(CPU).load_trainable_policy(locate_model_folder(world.build(policy)))
    pairs = read_pairs(world.build(world.selection) / "easy.parquet", lm, max_completion_tokens=LIMIT)
    place = draw_subset(range(len(pairs.prompts)), 3, COMPARISON_SEED)[0]
    prompts, completions = [pairs.prompts[place]], [pairs.completions[place]]
    reference = world.load(world.sft)
    before = compute_sequence_logprobs(lm, prompts, completions, token_budget=4096)[0]
    anchored = compute_sequence_logprobs(reference, prompts, completions, token_budget=4096)[0]
    assert [row["log_x_chosen"], row["log_x_rejected"]] == pytest.approx((before - anchored).tolist(), abs=1e-4)
    batch = pack_branches(prompts, completions)
    chosen, rejected = lm(batch, "logprobs").sum(dim=-1)[0]
    loss = dpo_loss(chosen[None], rejected[None], anchored[:1], anchored[1:], beta=0.1)
    loss.sum().backward()
    rate, weight = 1e-4, 0.1 * float(torch.sigmoid(-0.1 * ((chosen - rejected).detach() - (anchored[0] - anchored[1]))))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    moved = compute_sequence_logprobs(lm, prompts, completions, token_budget=4096)[0] - before
    expected = [
        rate * weight * (row["chosen_chosen"] - row["chosen_rejected"]),
        rate * weight * (row["chosen_rejected"] - row["rejected_rejected"]),
    ]
    assert moved.tolist() == pytest.approx(expected, rel=0.1)
    assert moved[0] > 0 > moved[1]


def test_evaluation_reports_true_reward_and_kl(world: World) -> None:
    sft, tuned = (read_stage_summary(world.build(evaluation(world, one))) for one in (world.sft, world.dpo(epochs=4)))
    assert sft["kl_from_sft"]["mean"] == 0.0
    assert tuned["kl_from_sft"]["mean"] > 0.0
    assert tuned["score"]["mean"] != sft["score"]["mean"]
    assert sft["true_reward"]["low"] <= sft["true_reward"]["mean"] <= sft["true_reward"]["high"]


def test_identity_follows_settings_and_content_but_not_the_runtime(world: World, tmp_path: Path) -> None:
    other = World(world.stage_cache.cache)
    assert other.stage_cache.locate_folder(other.ppo()) == world.stage_cache.locate_folder(world.ppo())
    assert world.stage_cache.locate_folder(world.ppo(kl_coef=0.3)) != world.stage_cache.locate_folder(world.ppo())
    moved = StageCache(world.stage_cache.cache, Runtime(microbatch_tokens=7, threads=1))
    assert moved.locate_folder(world.ppo()) == world.stage_cache.locate_folder(world.ppo())

    def folder(file: str, prompts: range) -> Path:
        data = Data(base=world.base, format="preference", train=lines_of(prompts, tmp_path / file))
        return world.stage_cache.locate_folder(data)

    assert folder("one.jsonl", range(1)) == folder("two.jsonl", range(1)) != folder("two.jsonl", range(2))


def test_another_default_is_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are named without defaults, so a default that changed must not find what the old one made."""
    StageCache(tmp_path, RUNTIME).compute_with_inputs(Pretrained())
    monkeypatch.setattr(Pretrained.model_fields["init_seed"], "default", 1)
    Pretrained.model_rebuild(force=True)
    try:
        other = r"Pretrained.*-c7b2a294: .* another version of mixpo \(init_seed 0 then, 1 now\); delete it or choose"
        with pytest.raises(InputError, match=other):
            StageCache(tmp_path, RUNTIME).is_done(Pretrained())
    finally:
        monkeypatch.undo()
        Pretrained.model_rebuild(force=True)


def test_a_model_is_known_by_every_file_that_changes_it(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(locate_model_folder(world.build(world.sft)), folder)
    digests = {compute_model_digest(folder)}
    for name in ("special_tokens_map.json", "chat_template.jinja", "added_tokens.json"):
        (folder / name).write_text("{}")
        digests.add(compute_model_digest(folder))
    (folder / "optimizer.pt").write_text("")
    assert len(digests | {compute_model_digest(folder)}) == 4


def test_identity_tells_train_from_test_and_keeps_the_order(world: World) -> None:
    def folder(**sources: Any) -> Path:
        return world.stage_cache.locate_folder(Data(base=world.base, format="preference", **sources))

    both = folder(train=("hub:a/a", "hub:b/b"))
    assert both != folder(train="hub:a/a", test="hub:b/b")
    assert both != folder(train="hub:a/a", demonstrations="hub:b/b")
    assert both != folder(train=("hub:b/b", "hub:a/a"))


def test_a_local_model_is_copied_and_may_be_moved(world: World, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(locate_model_folder(world.build(world.sft)), source)
    stage = Pretrained(path=str(source))
    folder = StageCache(tmp_path / "cache", RUNTIME).compute_with_inputs(stage)
    source.rename(tmp_path / "moved")
    ModelLoader(CPU).load_policy(locate_model_folder(folder))
    moved = Pretrained(path=str(tmp_path / "moved"))
    assert StageCache(tmp_path / "cache", RUNTIME).locate_folder(moved) == folder


def test_two_runs_never_compute_a_stage_at_once(tmp_path: Path) -> None:
    stage_cache = StageCache(tmp_path, RUNTIME)
    stage = Pretrained()
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks" / stage_cache.compute_identity(stage)).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = threading.Thread(target=stage_cache.compute_stage, args=(stage,))
        other.start()
        other.join(timeout=1.0)
        assert other.is_alive(), "it waits"
        assert not stage_cache.is_done(stage)
    other.join(timeout=60)
    assert stage_cache.is_done(stage)


def test_a_finished_stage_is_not_computed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.build(world.sft)
    stamp = (folder / "summary.json").stat().st_mtime_ns

    def fail(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(SFT, "compute", fail)
    assert StageCache(world.stage_cache.cache, RUNTIME).compute_stage(world.sft) == folder
    assert (folder / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "dpo-lora", "ppo", "budget", "ppo-lora", "rloo"])
def test_a_killed_stage_goes_on_and_ends_with_the_same_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage: Stage = {
        "sft": world.sft.model_copy(update={"epochs": 1}),
        "reward": world.reward,
        "dpo": world.dpo(epochs=2),
        "dpo-lora": world.dpo(epochs=2, lora={"rank": 4, "dropout": 0.1}),
        "ppo": world.ppo(epochs=2, minibatches=2, kl_target=1.0, snapshots=2),
        "budget": world.ppo(epochs=2, kl_budget=0.5),
        "ppo-lora": world.ppo(epochs=2, lora={"rank": 4}),
        "rloo": world.ppo(advantage="rloo", completions_per_prompt=2),
    }[kind]
    runtime = Runtime(threads=2, checkpoint_minutes=0)
    whole, killed = world.compute(stage, tmp_path / "whole", runtime), tmp_path / "killed"
    original = MetricsLog.append_step
    apart = "a\u2028b\x85c"  # separators of lines, but not of JSON Lines
    monkeypatch.setattr("mixpo.models.language_model.LanguageModel.decode_completion", lambda *_: apart)

    def die(self: MetricsLog, step: int, total: int, metrics: Any) -> None:
        original(self, step, total, metrics)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "append_step", die)
    with pytest.raises(KeyboardInterrupt):
        world.compute(stage, killed, runtime)
    monkeypatch.setattr(MetricsLog, "append_step", original)
    world.compute(stage, killed, runtime)
    one, other = weights(whole), weights(killed)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [row["loss"] for row in read_metrics(whole)] == [row["loss"] for row in read_metrics(killed)]


def test_a_reward_model_with_other_tokens_reads_the_text(world: World) -> None:
    policy = world.load(world.sft)
    reward = world.load(world.reward)
    unique_prompts = [[{"role": "user", "content": "Any advice on chess?"}]]
    prompts = [policy.tokenizer.encode("<|user|>Any advice on chess?<|assistant|>")]
    completion = [*policy.tokenizer.encode("Castle soon."), policy.end_token]
    cut = policy.tokenizer.encode("Castle soon")
    completions = [[completion, cut]]
    assert retokenize_for_reward(reward, policy, unique_prompts, prompts, completions) == (prompts, completions)
    reward.tokenizer = build_world_tokenizer(512)
    assert reward.tokenization_digest != policy.tokenization_digest
    again_prompts, again = retokenize_for_reward(reward, policy, unique_prompts, prompts, completions)
    assert reward.tokenizer.decode(again_prompts[0]) == "<|user|>Any advice on chess?<|assistant|>"
    assert reward.tokenizer.decode(again[0][0]) == "Castle soon.<|end|>"
    assert reward.tokenizer.decode(again[0][1]) == "Castle soon"


def test_rows_for_a_second_reward_model_may_be_files_of_their_own(world: World, tmp_path: Path) -> None:
    files = {
        "train": lines_of(range(20), tmp_path / "train.jsonl"),
        "test": lines_of(range(20, 30), tmp_path / "test.jsonl"),
    }
    second = lines_of(range(15, 60), tmp_path / "second.jsonl")
    data = Data(base=world.base, format="preference", **files, second=second, second_rows=12)
    rows = {name: read_table(world.build(data) / f"{name}.parquet") for name in ("train", "test", "second")}
    assert [len(rows[name]) for name in ("train", "test", "second")] == [20, 10, 12]
    assert {row["prompt"] for row in rows["second"]} <= {f"Question {n}?" for n in range(30, 60)}
    without = Data(base=world.base, format="preference", **files)
    unread = Data(base=world.base, format="preference", **files, second=second)
    locate = world.stage_cache.locate_folder
    assert locate(data) != locate(without) == locate(unread)


def test_fewer_rows_than_were_asked_for_are_told(world: World, tmp_path: Path, watching: Mock) -> None:
    train = lines_of(range(20), tmp_path / "train.jsonl")
    world.build(Data(base=world.base, format="preference", train=train, train_rows=30))
    watching.on_message.assert_any_call("data.train: 18 rows, where 30 were asked for: there are no more")


def lines_of(prompts: range, file: Path, **sides: str) -> str:
    rows = ({"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No.", **sides} for n in prompts)
    return write_jsonl(file, rows)


def test_rows_that_share_a_prompt_are_validated_on_together(world: World, tmp_path: Path) -> None:
    """Ten prompts of six pairs: one prompt is held out with its six pairs, where a split of rows holds out three."""
    for number in range(6):
        lines_of(range(10), tmp_path / f"{number}.jsonl", chosen=f"Yes {number}.")
    train = tuple(str(tmp_path / f"{number}.jsonl") for number in range(6))
    test = lines_of(range(10, 12), tmp_path / "test.jsonl")
    data = Data(base=world.base, format="preference", train=train, test=test)
    stage = RewardModel(policy=world.base, pairs=data.train_pairs, data=data, validation_share=0.05)
    summary = read_stage_summary(world.build(stage))
    assert (summary["pairs"], summary["validation"]["pairs"], summary["test"]["pairs"]) == (54, 6, 2)
    alone = Data(base=world.base, format="preference", train=lines_of(range(1), tmp_path / "one.jsonl"), test=test)
    with pytest.raises(InputError, match=r"^reward.validation_share: found one prompt in 1 usable rows"):
        world.build(RewardModel(policy=world.base, pairs=alone.train_pairs, data=alone))


def language_model(tokenizer: Any) -> LanguageModel:
    return LanguageModel(Mock(), tokenizer, tokenizer.eos_token_id)


def test_a_reward_model_with_other_tokens_reads_long_text_whole() -> None:
    policy, reward = (language_model(build_world_tokenizer(size)) for size in (1024, 512))
    text = "Castle soon. " * 20
    completion = [*policy.tokenizer.encode(text), policy.end_token]
    ((found,),) = retokenize_for_reward(reward, policy, ["Any advice?"], [[5]], [[completion]])[1]
    assert reward.tokenizer.decode(found) == text + "<|end|>"


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted(tmp_path: Path, watching: Mock) -> None:
    tokenizer = build_world_tokenizer()
    long = "a b c d e f"
    pairs = [("x", "y"), (f"{long} g", f"{long} h"), (f"{long} g", "y"), ("a b c", "a b c d")]
    rows = [{"prompt": f"Question {n}?", "chosen": one, "rejected": other} for n, (one, other) in enumerate(pairs)]
    write_table(tmp_path / "train.parquet", rows)
    ids = [[[*tokenizer(side)["input_ids"], tokenizer.eos_token_id] for side in sides] for sides in pairs]
    limit = len(tokenizer(long)["input_ids"])
    read = read_pairs(tmp_path / "train.parquet", language_model(tokenizer), max_completion_tokens=limit)
    assert read.completions == [[side[:limit] for side in ids[n]] for n in (0, 2, 3)]
    assert read.prompt_texts == [f"Question {n}?" for n in (0, 2, 3)]
    assert read.prompts == [tokenizer(f"Question {n}?")["input_ids"] for n in (0, 2, 3)]
    assert (read.truncated, read.identical) == (sum(len(side) > limit for sides in ids for side in sides), 1) == (3, 1)
    assert [call.args[0] for call in watching.on_message.call_args_list] == [
        f"train: 3 of 8 completions (38%) are cut to max_completion_tokens {limit} and have no end token",
        "train: 1 of 4 pairs left out: both completions are the same",
    ]
    write_table(tmp_path / "cut.parquet", rows[1:2])
    with pytest.raises(InputError, match="found 1 pairs, cut to max_completion_tokens 2, each of two identical"):
        read_pairs(tmp_path / "cut.parquet", language_model(tokenizer), max_completion_tokens=2)


def test_sampled_pairs_of_the_same_tokens_are_left_out_with_their_logprobs(tmp_path: Path) -> None:
    tokens = [[[5, 6], [5, 7]], [[8], [8]], [[9], [5]]]
    rows = []
    for n, sides in enumerate(tokens):
        logprobs = [[-float(n)] * len(side) for side in sides]
        rows.append({"prompt": f"Question {n}?", "prompt_tokens": [n], "tokens": sides, "logprobs": logprobs})
    lm = language_model(build_world_tokenizer())
    write_table(tmp_path / "pairs.parquet", rows, sampler="me", tokenizer=lm.tokenization_digest)
    with pytest.raises(InputError, match=r"pairs.parquet: found completions that were sampled with another tokenizer"):
        read_pairs(tmp_path / "pairs.parquet", language_model(build_world_tokenizer(512)), max_completion_tokens=1)
    read = read_pairs(tmp_path / "pairs.parquet", lm, max_completion_tokens=1)
    assert read.completions == [tokens[0], tokens[2]]
    assert read.logprobs == [[0.0, 0.0], [-2.0, -2.0]]
    assert (read.identical, read.truncated, read.sampler) == (1, 0, "me")


def test_cut_pairs_teach_the_reward_model_and_dpo_nothing_and_stand_in_their_summaries(
    world: World, tmp_path: Path
) -> None:
    long = "very " * 12
    files = (
        lines_of(range(8), tmp_path / "good.jsonl"),
        lines_of(range(8, 12), tmp_path / "long.jsonl", chosen=long + "good", rejected=long + "bad"),
    )
    data = Data(base=world.base, format="preference", train=files, test=files)
    reward = RewardModel(policy=world.base, pairs=data.train_pairs, data=data, max_completion_tokens=10)
    summary = read_stage_summary(world.build(reward))
    assert (summary["truncated"], summary["identical"]) == (8, 4)
    assert summary["pairs"] + summary["validation"]["pairs"] == 8
    assert (summary["test"]["pairs"], summary["test"]["identical"], summary["test"]["truncated"]) == (8, 4, 8)
    tuned = world.dpo(policy=world.base, reference=world.base, pairs=data.train_pairs, samplings=0, learning_rate=1e-4)
    summary = read_stage_summary(world.build(tuned.model_copy(update={"max_completion_tokens": 10})))
    assert (summary["pairs"], summary["truncated"], summary["identical"]) == (8, 8, 4)


def test_prompts_are_drawn_from_all_files_and_are_the_same_for_all(tmp_path: Path) -> None:
    tokenizer, file = build_world_tokenizer(), tmp_path / "rows.parquet"
    rows = [{"prompt": [{"role": "user", "content": f"{n // 2}?"}]} for n in range(400)]
    write_table(file, add_token_columns(rows, tokenizer), tokenizer=compute_tokenization_digest(tokenizer))

    def numbers(count: int | None = None) -> list[int]:
        prompts, tokens = read_unique_prompts(file, tokenizer, count)
        assert tokens == [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
        return [int(prompt[0]["content"][:-1]) for prompt in prompts]

    assert numbers() == list(range(200))
    assert len(numbers(40)) == 40
    assert numbers(40) == sorted(numbers(40))
    assert 10 < sum(number >= 100 for number in numbers(40)) < 30  # half of them, within three standard deviations
    assert [number for number in numbers(80) if number in numbers(40)] == numbers(40)


@pytest.mark.parametrize("damage", [{"tokens": None}, {"prompt_tokens": None}])
def test_rows_without_tokens_are_refused(tmp_path: Path, damage: dict[str, None]) -> None:
    tokenizer, file = build_world_tokenizer(), tmp_path / "rows.parquet"
    (row,) = add_token_columns([{"prompt": "Any?", "chosen": "a", "rejected": "b"}], tokenizer)
    write_table(file, [row, {**row, **damage}], tokenizer=compute_tokenization_digest(tokenizer))
    with pytest.raises(InputError, match=r"rows\.parquet: found rows without tokens; expected those that the stage"):
        read_tokenized_rows(file, tokenizer)


def test_a_completion_that_the_template_refuses_stops_the_run_by_its_text(tiny: TinyWorld, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.content == 'never' %}{{ raise_exception('no such word') }}{% endif %}"
    template += "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    base = Pretrained(path=str(locate_model_folder(tiny.build(Pretrained()))), chat_template=template)
    rows = [{"prompt": [{"role": "user", "content": f"Q{n}?"}], "chosen": "yes", "rejected": "no"} for n in range(20)]
    rows[7]["rejected"] = "never"
    data = Data(base=base, format="preference", train=write_jsonl(tmp_path / "train.jsonl", rows))
    refusal = "the dialogue of the prompt 'Q7[?]' and 'yes' is refused by the tokenizer's chat template .no such word.;"
    with pytest.raises(InputError, match=refusal):
        tiny.build(data)


@pytest.mark.parametrize("size", [1024, 512], ids=["its own tokenizer", "another"])
def test_rows_are_tokenized_once_and_again_for_another_tokenizer(tmp_path: Path, size: int) -> None:
    own, reader, file = build_world_tokenizer(), build_world_tokenizer(size), tmp_path / "rows.parquet"
    rows = [{"prompt": "Any advice on chess?", "chosen": "Castle soon.", "rejected": "Play."}]
    written = add_token_columns(rows, own)
    written[0]["prompt_tokens"] = [7]  # a mark by which the file's tokens are known
    write_table(file, written, tokenizer=compute_tokenization_digest(own))
    expected = written[0]["prompt_tokens"] if size == 1024 else tokenize_prompt(reader, rows[0]["prompt"])
    assert read_tokenized_rows(file, reader)[0]["prompt_tokens"] == read_unique_prompts(file, reader)[1][0] == expected
    texts = [reader.decode(tokens) for tokens in read_tokenized_rows(file, reader)[0]["tokens"]]
    assert texts == ["Castle soon.<|end|>", "Play.<|end|>"]


def test_what_is_read_from_a_path_is_part_of_the_datas_identity(world: World, tmp_path: Path) -> None:
    def data(folder: str) -> Data:
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [{"chosen": HH.format(f"{n}?", "Yes."), "rejected": HH.format(f"{n}?", "No.")} for n in range(8)]
        path = write_jsonl(tmp_path / folder / "rows.jsonl", rows)
        return Data(base=world.base, format="hh-rlhf", train=path)

    mine, moved, harmless = data("mine"), data("yours"), data("harmless-base")
    assert world.stage_cache.locate_folder(mine) == world.stage_cache.locate_folder(moved)
    assert world.stage_cache.locate_folder(mine) != world.stage_cache.locate_folder(harmless)
    for one, categories in ((mine, {None}), (harmless, {"harmless"})):
        assert {row["category"] for row in read_table(world.build(one) / "train.parquet")} == categories
    names = ("helpful-base", "harmless-base")
    hub = [Data(base=world.base, format="hh-rlhf", train=f"hub:Anthropic/hh-rlhf/{name}") for name in names]
    assert len(set(map(world.stage_cache.locate_folder, hub))) == 2


def test_prompts_of_train_and_test_are_counted_and_left_out_on_request(
    world: World, tmp_path: Path, watching: Mock
) -> None:
    shared = lines_of(range(30), tmp_path / "train.jsonl"), lines_of(range(20, 50), tmp_path / "test.jsonl")
    demonstrations = [{"prompt": f"Question {n}?", "completion": "x"} for n in (0, 45, 60)]
    shown = write_jsonl(tmp_path / "shown.jsonl", demonstrations)

    def build(shared_prompts: str) -> tuple[dict[str, Any], list[set[str]]]:
        settings = {"train": shared[0], "test": shared[1], "demonstrations": shown, "shared_prompts": shared_prompts}
        folder = world.build(Data(base=world.base, format="preference", **settings))
        names = ("train", "test", "demonstrations")
        prompts = [{row["prompt"] for row in read_table(folder / f"{name}.parquet")} for name in names]
        return read_stage_summary(folder), prompts

    summary, (train, test, demonstrations) = build("keep")
    assert summary["shared_prompts"] == len((train | demonstrations) & test) == 11
    watching.on_message.assert_any_call(
        "11 of 30 test prompts are trained on too; data.shared_prompts=drop leaves their rows out"
    )
    summary, (train, test, demonstrations) = build("drop")
    assert train == {f"Question {n}?" for n in range(20)}
    assert demonstrations == {"Question 0?", "Question 60?"}
    assert test == {f"Question {n}?" for n in range(20, 50)}
    assert (summary["shared_prompts"], summary["shared_rows_dropped"]) == (0, 11)
    watching.on_message.assert_any_call("11 rows left out, whose prompts are test prompts")
    shared = shared[0], shared[0]
    with pytest.raises(InputError, match=r"^data.shared_prompts: drop leaves no rows of data.train"):
        build("drop")


def test_the_columns_of_a_source_are_told_and_kept(world: World, tmp_path: Path, watching: Mock) -> None:
    path = lines_of(range(20), tmp_path / "train.jsonl", score="5", system="Be brief.")
    folder = world.build(Data(base=world.base, format="preference", train=path))
    expected = "preferences read as preference: prompt, chosen, rejected, system; ignored: score"
    watching.on_message.assert_any_call(expected)
    used = ["prompt", "chosen", "rejected", "system"]
    assert read_stage_summary(folder)["columns"] == {"preferences": {"used": used, "ignored": ["score"]}}
    assert read_table(folder / "train.parquet")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"train": 1}, r"^data.train: found one prompt in 1 usable rows.*or name held-out rows in data.test"),
        ({"train": 4, "test": 0}, r"^data.test: nothing is left of 5 rows: all of its rows are among the 1 bad ones"),
        ({"train": 0}, r"^data.train: nothing is left of 1 rows.*; the first is .*train.jsonl:1: 'chosen' is empty"),
        ({"train": 4, "demonstrations": 0}, r"^data.demonstrations: nothing is left of 5 rows"),
        ({"train": 4, "second": 4}, r"^data.second: all 4 rows have prompts of train or test rows"),
    ],
)
def test_a_part_without_rows_is_named(world: World, tmp_path: Path, sources: dict[str, int], expected: str) -> None:
    """0 stands for a file whose only row is bad."""
    settings: dict[str, Any] = {"second_rows": 2 if "second" in sources else 0}
    for name, count in sources.items():
        bad = {} if count else {"chosen": "", "completion": ""}
        settings[name] = lines_of(range(max(count, 1)), tmp_path / f"{name}.jsonl", **bad)
    with pytest.raises(InputError, match=expected):
        world.build(Data(base=world.base, format="preference", on_bad_row="drop", **settings))


def test_a_gap_that_is_no_number_is_refused_with_its_row(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "gap": gap, "scores": [gap, 0.0], "tokens": [[1], [2]]} for gap in (1.0, math.nan, 2.0)]
    write_table(tmp_path / "pairs.parquet", rows)
    selection = Selection(samples=world.samples, threshold=1.5)
    with pytest.raises(InputError, match=r"pairs.parquet: row 2 has the gap nan and the scores \[nan, 0.0\].*1 of 3"):
        selection.compute({"samples": tmp_path}, StageJob(tmp_path, RUNTIME))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_with_its_row(monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    computed_scores = torch.tensor([[0.5, 1.0], [0.0, 0.0], [1.0, broken]])
    monkeypatch.setattr(scoring, "compute_outputs", lambda *_, **__: computed_scores)
    tokenizer = build_world_tokenizer()
    prompts = [tokenizer.encode(f"Question {n}?") for n in range(3)]
    where = rf"found the scores \[1.0, {broken}\] for the prompt that ends with 'Question 2\?'; expected finite"
    with pytest.raises(InputError, match=where):
        scoring.compute_scores(language_model(tokenizer), prompts, [[[1], [2]]] * 3, token_budget=64)
    computed_scores[2, 1] = 2.0
    scores = scoring.compute_scores(language_model(tokenizer), prompts, [[[1], [2]]] * 3, token_budget=64)
    assert torch.equal(scores, computed_scores)
