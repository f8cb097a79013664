"""Settings that exclude each other are refused in one line, before anything is computed."""

from typing import Any

import pytest

from mixpo import SFT, Samples, StageCache
from mixpo.data.errors import InputError
from mixpo.experiments.plan import list_plan
from mixpo.experiments.recipe import read_recipe
from mixpo.stages.requirements import check_requirements
from mixpo.stages.stage import Snapshot
from mixpo.training.runtime import Runtime
from worlds import TinyWorld

SHARDED = {"sharded": True}
OFFLOADED = {"offload_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "runtime", "count", "message"),
    [
        ({"lora": {"quantize_base": True}}, SHARDED, 2, "runtime.sharded: found beside lora.quantize_base in SFT"),
        ({"lora": {"modules_to_save": ("norm",)}}, SHARDED, 2, "runtime.sharded: found beside lora.modules_to_save"),
        ({"optimizer": "adamw-8bit"}, SHARDED, 2, "runtime.sharded: found beside optimizer: adamw-8bit"),
        ({"optimizer": "adamw-8bit"}, OFFLOADED, 1, "runtime.offload_optimizer: found beside optimizer: adamw-8bit"),
    ],
)
def test_what_excludes_each_other_is_refused(
    tiny: TinyWorld, settings: dict[str, Any], runtime: dict[str, Any], count: int, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}.*; expected one of the two, since .*; leave one out$"):
        check_requirements(tiny.sft(**settings), Runtime(**runtime), count)
    check_requirements(tiny.sft(**settings), Runtime(), count)
    check_requirements(tiny.sft(), Runtime(), count)
    if runtime == SHARDED:
        check_requirements(tiny.sft(**settings), Runtime(**runtime), 1)  # one process cuts nothing


def test_a_server_samples_for_one_process_and_takes_adapters_alone(tiny: TinyWorld) -> None:
    served = tiny.ppo(sampler="vllm")
    check_requirements(served, Runtime(), 1)
    with pytest.raises(InputError, match=r"^several processes: found beside sampler: vllm in PPO; expected one of"):
        check_requirements(served, Runtime(), 2)
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found beside sampler: vllm in PPO; expected one of"):
        check_requirements(tiny.ppo(sampler="vllm", lora={"modules_to_save": ("norm",)}), Runtime(), 1)


def test_a_server_is_refused_a_policy_in_which_an_earlier_stage_trained_modules_whole(tiny: TinyWorld) -> None:
    first = tiny.sft(lora={"modules_to_save": ("norm",)})
    second = tiny.dpo(policy=first, reference=first, lora={"rank": 2})  # which keeps what was trained
    third = tiny.ppo(policy=second, reference=second, sft=first, lora={"rank": 2}, snapshots=1)
    for stage, place in (
        (tiny.evaluation(policy=second, sampler="vllm"), "Evaluation, whose policy has those of SFT"),
        (tiny.evaluation(policy=Snapshot(stage=third, number=1), sampler="vllm"), "Evaluation, whose policy has those"),
        (Samples(policy=first, reward=tiny.scored_by, rows=tiny.pairs.train_pairs, sampler="vllm"), "Samples, whose"),
        (third.model_copy(update={"sampler": "vllm"}), "PPO, whose policy has those of SFT"),
    ):
        with pytest.raises(InputError, match=f"^lora.modules_to_save: found beside sampler: vllm in {place}"):
            check_requirements(stage, Runtime(), 1)
        check_requirements(stage.model_copy(update={"sampler": "local"}), Runtime(), 1)
    with pytest.raises(InputError, match=r"^runtime.sharded: found beside lora.modules_to_save in Evaluation, whose"):
        check_requirements(tiny.evaluation(policy=second), Runtime(**SHARDED), 2)

    merged = tiny.dpo(policy=first, reference=first)
    for policy in (merged, tiny.dpo(policy=merged, reference=merged, lora={"rank": 2})):
        check_requirements(tiny.evaluation(policy=policy, sft=first, sampler="vllm"), Runtime(), 1)


def test_cut_weights_are_refused_modules_that_trained_whole_in_any_model_that_is_loaded(tiny: TinyWorld) -> None:
    """A model whose weights all train is whole, adapters merged; its reference is another one, unless it is itself."""
    saving = {"lora": {"modules_to_save": ("norm",)}}
    reward, policy = tiny.reward(**saving), tiny.sft(**saving)
    pairs = tiny.pairs.train_pairs
    for stage, place in (
        (Samples(policy=tiny.policy, reward=reward, rows=pairs), "Samples, whose reward has those of RewardModel;"),
        (tiny.ppo(reward=reward), "PPO, whose reward has those of RewardModel;"),
        (tiny.ppo(policy=policy, reference=policy), "PPO, whose reference has those of SFT;"),
        (tiny.dpo(reference=policy), "DPO, whose reference has those of SFT;"),
        (tiny.evaluation(sft=policy), "Evaluation, whose sft has those of SFT;"),
        (tiny.evaluation(second=reward), "Evaluation, whose second has those of RewardModel;"),
    ):
        with pytest.raises(InputError, match=f"^runtime.sharded: found beside lora.modules_to_save in {place}"):
            check_requirements(stage, Runtime(**SHARDED), 2)
        check_requirements(stage, Runtime(), 2)
    check_requirements(tiny.dpo(policy=policy), Runtime(**SHARDED), 2)
    check_requirements(tiny.dpo(policy=policy, reference=policy), Runtime(**SHARDED), 2)
    check_requirements(tiny.gradients().model_copy(update={"reference": policy}), Runtime(**SHARDED), 2)


def test_moments_in_8_bits_of_adapters_are_whole(tiny: TinyWorld) -> None:
    stage = tiny.sft(optimizer="adamw-8bit", lora={"rank": 2})
    check_requirements(stage, Runtime(**SHARDED), 2)
    with pytest.raises(InputError, match=r"^runtime.offload_optimizer: found beside optimizer: adamw-8bit in SFT"):
        check_requirements(stage, Runtime(**OFFLOADED), 2)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw-8bit"}, {"lora": {"quantize_base": True}}])
def test_a_missing_package_is_named_with_its_command(
    tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    check_requirements(tiny.sft(**settings), Runtime(), 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(
        InputError, match=r": found without the package bitsandbytes.*; run pip install 'mixpo\[qlora\]'"
    ):
        check_requirements(tiny.sft(**settings), Runtime(), 1)


def test_the_plan_refuses_before_anything_is_computed(tmp_path: Any) -> None:
    overrides = ["runtime.processes=2", "runtime.sharded=true", "lora.quantize_base=true", f"cache={tmp_path}"]
    with pytest.raises(InputError, match=r"^runtime.sharded: found beside lora.quantize_base"):
        list_plan(read_recipe("world", overrides))


def test_cached_stages_require_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["runtime.offload_optimizer=true", "sft.optimizer=adamw-8bit", "arms=[sft]", f"cache={tmp_path}"]
    recipe, is_done = read_recipe("world", words), StageCache.is_done
    with pytest.raises(InputError, match=r"^runtime.offload_optimizer: found beside optimizer: adamw-8bit in SFT"):
        list_plan(recipe)
    monkeypatch.setattr(StageCache, "is_done", lambda cache, stage: isinstance(stage, SFT) or is_done(cache, stage))
    list_plan(recipe)


def test_a_stage_is_refused_where_it_is_computed_too(tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.stage_cache, "runtime", Runtime(offload_optimizer=True))
    with pytest.raises(InputError, match=r"^runtime.offload_optimizer: found beside optimizer: adamw-8bit in SFT"):
        tiny.build(tiny.sft(optimizer="adamw-8bit"))
