"""`mixpo plan`: tokens and FLOPs against those of finished stages, what stages hold, refusals and what they suggest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig

from command_line import run_mixpo
from mixpo import DPO, PPO, SFT, Data, Evaluation, Pretrained, RewardModel, Samples, Selection, StageCache
from mixpo.data.errors import InputError
from mixpo.experiments import run_costs
from mixpo.experiments.row_lengths import RowLengthEstimator
from mixpo.experiments.run_costs import _SettingChange, choose_devices, find_fitting_changes
from mixpo.experiments.stage_costs import CostPlanner, StageCost
from mixpo.models.adapters import LoraSettings
from mixpo.models.shapes import read_model_shape
from mixpo.stages.gradients import Gradients
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import read_stage_summary
from mixpo.training.footprint import PlannedRuntime
from mixpo.training.rates import CARDS
from mixpo.training.runtime import Runtime

if TYPE_CHECKING:
    from worlds import TinyWorld

GB = 1e9
LIMIT = 512


@pytest.fixture
def llama_7b(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="float16").save_pretrained(folder)
    return folder


def build_stages(precision: Any = "bfloat16", lora: LoraSettings | None = None) -> dict[str, Any]:
    """The stages of MPO on the Llama of `--config`."""
    common: dict[str, Any] = {"precision": precision, "max_completion_tokens": LIMIT}
    training = {**common, "lora": lora, "batch_size": 64}
    base = Pretrained(path="meta-llama/Llama-2-7b-hf")
    data = Data(base=base, train_rows=640, test_rows=64, demonstration_rows=640, max_prompt_tokens=512)
    sft = SFT(base=base, data=data, **training)
    reward = RewardModel(policy=sft, pairs=data.train_pairs, data=data, **training)
    samples = Samples(policy=sft, reward=reward, rows=data.train_pairs, **common)
    selection = Selection(samples=samples, easy_fraction=0.25)
    dpo = DPO(policy=sft, reference=sft, pairs=selection.easy_pairs, **training)
    ppo = PPO(policy=dpo, reference=dpo, sft=sft, reward=reward, prompts=selection.hard_pairs, **training)
    evaluation = Evaluation(policy=ppo, sft=sft, reward=reward, data=data, prompts=64, **common)
    stages = {"base": base, "data": data, "sft": sft, "reward": reward, "samples": samples, "selection": selection}
    return {**stages, "dpo": dpo, "ppo": ppo, "evaluation": evaluation}


def plan(stage: Stage, config: Path, **runtime: Any) -> StageCost:
    options: dict[str, Any] = {
        "device": "cuda",
        "microbatch_tokens": 2048,
        "sampling_bytes": 4 << 30,
        **runtime,
    }
    stage_cache = StageCache(config / "cache", Runtime())
    planner = CostPlanner(stage_cache, PlannedRuntime(**options), lambda precision: CARDS["h100"], config_path=config)
    cost = planner.plan_stage(stage)
    assert cost is not None
    return cost


def test_tokens_and_flops_are_those_that_the_stages_counted(tiny: "TinyWorld") -> None:
    planner = CostPlanner(tiny.stage_cache, PlannedRuntime(), lambda precision: CARDS["h100"])
    for stage, tolerance in ((tiny.policy, 0.0), (tiny.scored_by, 0.02)):
        summary = read_stage_summary(tiny.build(stage))["cost"]
        cost = planner.plan_stage(stage)
        assert cost is not None
        counted = sum(summary[f"tokens_{kind}"] for kind in ("trained", "sampled", "scored"))
        assert cost.tokens == pytest.approx(counted, rel=tolerance)
        assert cost.flops == pytest.approx(summary["flops"], rel=tolerance)


def test_lengths_are_those_of_cached_rows_else_the_longest(tiny: "TinyWorld") -> None:
    tiny.build(tiny.pairs)
    rows = RowLengthEstimator(tiny.stage_cache)
    read = rows.list_rows(tiny.pairs, "train", 5)
    assert len(read) == 64
    assert max(max(row[1:]) for row in read) <= 5
    assert len({row[0] for row in read}) > 1
    assert not rows.assumptions
    data = tiny.pairs.model_copy(update={"data_seed": 7, "max_prompt_tokens": 33})
    assert rows.list_rows(data, "train", 5) == [(33, 5, 5)] * 64
    assert rows.list_prompts(data, "test", 4) == [33] * 4
    assert [line.split(":")[0] for line in rows.assumptions] == ["rows are not read yet"]


def test_rows_that_nothing_bounds_are_assumed_and_said() -> None:
    rows = RowLengthEstimator(StageCache(Path("no-cache"), Runtime()))
    data = Data(base=Pretrained(path="gpt2"), format="preference", train=("hub:OWNER/NAME",))
    assert len(rows.list_rows(data, "train", 5)) == 100_000
    assert "data.train_rows is not set: planned for 100,000 rows" in rows.assumptions
    assert len(rows.list_rows(data, "test", 5)) == 10_000  # test_share


def test_a_selection_takes_its_share(llama_7b: Path) -> None:
    stages = build_stages()
    rows = RowLengthEstimator(StageCache(llama_7b / "cache", Runtime()))
    easy, hard = (rows.list_rows(stages["selection"], part, LIMIT) for part in ("easy", "hard"))
    assert (len(easy), len(hard)) == (160, 480)
    assert easy[0] == (512, LIMIT, LIMIT)


def test_stages_that_train_whole_hold_sixteen_bytes_a_weight(llama_7b: Path) -> None:
    stages, weights = build_stages(), read_model_shape(LlamaConfig(), "Llama").weights
    sft, ppo = (plan(stages[name], llama_7b).footprint for name in ("sft", "ppo"))
    assert sft.gradients + sft.optimizer == pytest.approx(12 * weights)
    assert sft.weights == pytest.approx(6 * weights, rel=0.02)  # masters, and what autocast makes of them
    assert ppo.optimizer == pytest.approx(16 * weights, rel=0.02)  # of policy and value model
    # policy, value model, reference, SFT, reward model, and the cast policy
    assert ppo.weights == pytest.approx((4 + 4 + 2 + 2 + 2 + 2) * weights, rel=0.1)


def test_with_lora_ppo_holds_one_base(llama_7b: Path) -> None:
    stages, weights = build_stages(lora=LoraSettings(rank=16)), read_model_shape(LlamaConfig(), "Llama").weights
    ppo = plan(stages["ppo"], llama_7b)
    adapter = 16 * sum(one.inputs + one.outputs for one in read_model_shape(LlamaConfig(), "Llama").matrices)
    # as they are saved: SFT and DPO (policy and reference), SFT, SFT and reward; policy and value model train one each
    assert ppo.footprint.weights == pytest.approx(
        2 * weights + 2 * 131_072_000 + 4 * adapter * (2 + 1 + 2 + 2), rel=0.003
    )
    assert ppo.footprint.optimizer == 8 * 2 * adapter
    assert ppo.footprint.total < 40 * GB


def test_a_reward_model_is_scored_as_it_was_saved_beside_the_one_that_trained(llama_7b: Path) -> None:
    reward = plan(build_stages("float32")["reward"], llama_7b, microbatch_tokens=64)
    assert reward.moment == "scoring"


def test_log_probs_of_pairs_that_the_reference_sampled_cost_nothing(llama_7b: Path) -> None:
    stages = build_stages()
    free = stages["dpo"]
    paid = free.model_copy(update={"pairs": stages["data"].train_pairs})
    per_pair = [plan(stage, llama_7b).tokens / count for stage, count in ((free, 160), (paid, 640))]
    assert per_pair[1] == pytest.approx(2 * (512 + 2 * LIMIT), rel=0.05)
    assert per_pair[0] == pytest.approx(512 + 2 * LIMIT, rel=0.2)


@pytest.mark.parametrize("name", ["sft", "reward", "samples", "dpo", "ppo", "evaluation"])
def test_more_devices_take_less_time_and_memory_each(llama_7b: Path, name: str) -> None:
    stage = build_stages()[name]
    one, eight = (plan(stage, llama_7b, processes=count, is_sharded=True) for count in (1, 8))
    assert eight.flops == one.flops
    assert eight.seconds < one.seconds / 2  # a step of decoding reads all weights on every device
    assert eight.footprint.total < one.footprint.total


def test_what_is_cut_is_whole_while_it_is_loaded(llama_7b: Path) -> None:
    """On so many devices that nothing else takes as much."""
    shape = read_model_shape(LlamaConfig(), "Llama")
    cost = plan(build_stages()["sft"], llama_7b, processes=512, is_sharded=True, microbatch_tokens=1)
    assert cost.moment == "loading"
    assert cost.footprint.weights == pytest.approx(4 * shape.weights, rel=0.01)


def test_a_model_is_checked_in_the_type_of_its_file(llama_7b: Path) -> None:
    shape = read_model_shape(LlamaConfig(), "Llama")
    checked = plan(build_stages()["base"], llama_7b)
    assert checked.footprint.weights == 2 * shape.weights + 4 * 32_000 * 4_096, "and the embedding in float32"


def test_gradients_are_planned_with_whole_weights(llama_7b: Path) -> None:
    stages = build_stages()
    pairs = stages["data"].train_pairs
    read = {"policy": stages["dpo"], "reference": stages["sft"], "pairs": pairs}
    stage = Gradients(**read, beta=0.1, count=16, max_completion_tokens=LIMIT)
    cut, copied = (plan(stage, llama_7b, processes=8, is_sharded=is_sharded) for is_sharded in (True, False))
    assert cut == copied


def test_a_smaller_microbatch_takes_less_memory_and_the_same_work(llama_7b: Path) -> None:
    stage = build_stages()["dpo"]
    large, small = (plan(stage, llama_7b, microbatch_tokens=tokens) for tokens in (16_384, 2048))
    assert small.footprint.activations < large.footprint.activations / 6
    assert (small.tokens, small.flops) == (large.tokens, large.flops)


CHANGES = [
    _SettingChange("small", {"a": 1}),
    _SettingChange("smaller", {"a": 2}),
    _SettingChange("other", stage={"b": 1}),
]


@pytest.mark.parametrize(
    ("limit", "expected"), [(90, ["small"]), (75, ["smaller"]), (60, ["other"]), (35, ["smaller", "other"]), (5, None)]
)
def test_the_first_changes_that_fit_and_no_others(limit: float, expected: list[str] | None) -> None:
    saved = {"small": 15, "smaller": 30, "other": 40}

    def measure(changes: Sequence[_SettingChange]) -> float:
        return 100 - sum(saved[change.text] for change in changes)

    found = find_fitting_changes(CHANGES, measure, limit)
    assert (None if found is None else [change.text for change in found]) == expected


def test_a_change_that_saves_nothing_is_not_suggested() -> None:
    found = find_fitting_changes(CHANGES, lambda changes: 10 if CHANGES[2] in changes else 20, 15)
    assert found == [CHANGES[2]]


PAPER = ("hh-rlhf", "data.train_rows=640", "data.test_rows=64")


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_papers_recipe_fits_eight_gpus(working_folder, llama_7b, capsys):
    printed = run_mixpo(capsys, "plan", *PAPER, "--gpus", "8", "--memory", "80", "--config", str(llama_7b))
    assert printed.code == 0
    assert printed.err == ""
    assert "policy update: activations" in " ".join(printed.out.split())
    assert "H100 SXM: 40% of 989 TFLOP/s in bfloat16" in printed.out


IN_8_BITS = [f"{stage}.optimizer=adamw-8bit" for stage in ("sft", "reward", "dpo", "ppo")]


@pytest.mark.parametrize(
    ("words", "gpus", "memory", "beginning", "advice"),
    [
        (PAPER, 1, 80, "PPO: found a need of 3", "lora.rank=16"),
        ((*PAPER, "runtime.sharded=false"), 8, 80, "PPO: found a need of 3", "runtime.sharded=true"),
        # cut weights exclude moments in 8 bits, unless only adapters train
        ((*PAPER, "runtime.sharded=false", *IN_8_BITS), 8, 80, "PPO: found a need of 2", "lora.rank=16"),
        # an evaluation that fits whole weights does not fit their gathering
        (
            ("hh-rlhf", "arms=[dpo-base]", "runtime.sharded=false"),
            8,
            35.5,
            "SFT: found a need of 1",
            "runtime.microbatch_tokens=1024 runtime.sharded=true runtime.sampling_gib=8",
        ),
    ],
    ids=["lora", "cut", "8 bits", "evaluation"],
)
def test_what_does_not_fit_is_refused_with_the_settings_that_fit(
    working_folder, llama_7b, capsys, words, gpus, memory, beginning, advice
):
    options = ["--gpus", str(gpus), "--memory", str(memory), "--config", str(llama_7b)]
    printed = run_mixpo(capsys, "plan", *words, *options)
    assert printed.code == 2
    (line,) = printed.err.splitlines()
    assert line.startswith(beginning)
    assert line.endswith(f"; expected at most {memory} GB; set {advice}")
    again = run_mixpo(capsys, "plan", *words, *advice.split(), *options)
    assert (again.code, again.err) == (0, "")


def test_a_change_that_only_later_ones_give_an_effect_is_tried_again() -> None:
    def measure(changes: Sequence[_SettingChange]) -> float:
        return max(40 if CHANGES[2] in changes else 100, 20 if CHANGES[0] in changes else 50)

    assert find_fitting_changes([CHANGES[0], CHANGES[2]], measure, 45) == [CHANGES[2], CHANGES[0]]


def test_adapters_that_a_stage_has_keep_what_is_not_suggested(llama_7b: Path) -> None:
    stage = build_stages(lora=LoraSettings(rank=64, quantize_base=True))["dpo"]
    changed = run_costs._change_settings(stage, {"lora": {"rank": 16}})
    assert changed.lora == changed.policy.lora == LoraSettings(rank=16, quantize_base=True)
    assert run_costs._change_settings(build_stages()["dpo"], {"lora": {"rank": 16}}).lora == LoraSettings(rank=16)


def test_processes_of_the_devices_that_are_planned_for_exclude_settings_too(working_folder, capsys):
    words = ["world", "runtime.sharded=true", "lora.quantize_base=true"]
    assert run_mixpo(capsys, "plan", *words).code == 0
    printed = run_mixpo(capsys, "plan", *words, "--gpus", "8")
    assert printed.code == 2
    assert printed.err.startswith("runtime.sharded: found beside lora.quantize_base in SFT")


@pytest.mark.parametrize(("sampler", "times"), [("local", 0), ("vllm", 1)])
def test_what_a_server_holds_is_not_counted_and_that_is_said(working_folder, capsys, sampler, times):
    printed = run_mixpo(capsys, "plan", "world", "arms=[sft]", f"sampler={sampler}")
    assert printed.out.count("sampler: vllm: planned with the cache of sampler: local") == times


@pytest.mark.parametrize(("gpus", "sharded", "times"), [("1", "true", 1), ("1", "false", 0), ("8", "true", 0)])
def test_that_one_device_cuts_no_weights_is_said(working_folder, llama_7b, capsys, gpus, sharded, times):
    words = [f"runtime.sharded={sharded}", "--gpus", gpus, "--config", str(llama_7b)]
    printed = run_mixpo(capsys, "plan", *PAPER, *words)
    assert printed.out.count("runtime.sharded: planned for one device, which holds whole weights") == times


def test_what_fits_nowhere_is_said(working_folder, llama_7b, capsys):
    printed = run_mixpo(capsys, "plan", *PAPER, "--memory", "1", "--config", str(llama_7b))
    assert printed.code == 2
    assert "expected at most 1 GB; no setting makes it fit; take a smaller model or devices with more" in printed.err


def test_the_plan_of_this_machine_needs_no_option(working_folder, capsys):
    printed = run_mixpo(capsys, "plan", "world", "arms=[sft]")
    assert printed.code == 0
    assert "SFT" in printed.out.partition("tokens")[2]
    assert "this machine: 50% of" in printed.out
    assert "rows are not read yet: every prompt and completion is planned at the longest" in printed.out


def test_a_model_that_is_not_here_is_planned_by_its_config_alone(working_folder, capsys):
    assert run_mixpo(capsys, "plan", "hh-rlhf").code == 0
    printed = run_mixpo(capsys, "plan", "hh-rlhf", "--gpus", "8")
    assert printed.code == 2
    assert printed.err.startswith("meta-llama/Llama-2-7b-hf: found no config on this machine (")
    assert printed.err.rstrip().endswith("; or name a config.json by --config")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "h10"], "--gpu: found 'h10'; expected one of a100, h100, h200, b200, l40s; did you mean h100?"),
        (["--config", "none.json"], "none.json: found no config that can be read"),
        (["--gpus", "0"], "mixpo plan: --gpus: found '0'; expected greater than or equal to 1"),
    ],
)
def test_wrong_options(working_folder, capsys, words, expected):
    printed = run_mixpo(capsys, "plan", "world", *words)
    assert printed.code == 2
    assert expected in printed.err


def test_a_card_names_its_memory() -> None:
    assert choose_devices(None, None, "h200").memory_bytes == 141 * GB
    assert choose_devices(8, None, None).memory_bytes == 80 * GB
    assert choose_devices(8, 40, None).memory_bytes == 40 * GB
    assert choose_devices(None, None, None).gpus == 0
    with pytest.raises(InputError, match="expected one of"):
        choose_devices(1, None, "x")


def test_cached_stages_cost_nothing(tiny: "TinyWorld", monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build(tiny.policy)
    monkeypatch.setattr(run_costs, "list_stages", lambda recipe: [tiny.base, tiny.pairs, tiny.policy, tiny.sft(seed=9)])
    from mixpo.experiments.recipe import read_recipe

    recipe = read_recipe("world", [f"cache={json.dumps(str(tiny.stage_cache.cache))}"])
    costs = run_costs.plan_run_costs(recipe, choose_devices(1, None, None))
    assert costs.cached == 3
    ((name, cost, count),) = costs.lines
    assert (name, cost.stage, count) == (f"SFT {tiny.stage_cache.compute_identity(cost.stage)}", tiny.sft(seed=9), 1)
