"""What the benchmarks count and how they read their results; nothing here is timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import growth, ours
from benchmarks.__main__ import _merge_results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.__main__ import BenchmarkPartResults, _compare_with_goals
from benchmarks.gpu.right import _compare
from benchmarks.inputs import count_work
from benchmarks.mathematics import decoding_bytes, forward_flops
from benchmarks.plans import ChainPlanner
from benchmarks.tables import format_result, format_table
from benchmarks.workloads import SEVEN, Workload
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mixpo.data.tokens import compute_tokenization_digest
from mixpo.models.loading import ModelLoader
from mixpo.models.saving import save_model
from mixpo.models.sources import initialize_world_model
from mixpo.stages.rows import add_token_columns, write_table

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    tie_word_embeddings=True,
)


def test_flops_are_those_that_torch_counts() -> None:
    """Torch counts attention over all pairs, seen or not, and logits at every token."""
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 11, dtype=torch.long))
    unseen = 4 * 3 * 32 * (11 * 11 - 11 * 12 / 2)
    of_prompt = 2 * 32 * 50 * 7
    assert forward_flops([(7, [4])], CONFIG, predicts=True) == counter.get_total_flops() - unseen - of_prompt
    without = forward_flops([(7, [4])], CONFIG, predicts=False)
    assert forward_flops([(7, [4])], CONFIG, predicts=True) - without == 2 * 32 * 50 * 4


def test_a_shared_prompt_counts_once() -> None:
    one, two = (forward_flops([(7, completions)], CONFIG, predicts=True) for completions in ([4], [4, 4]))
    pairs = 4 * 7 + 4 * 5 / 2
    weights = sum(p.numel() for n, p in LlamaForCausalLM(CONFIG).named_parameters() if "proj" in n)
    assert two - one == 2 * weights * 4 + 2 * 32 * 50 * 4 + 4 * 3 * 32 * pairs


def test_decoding_reads_weights_once_a_step_and_keys_once_a_token() -> None:
    model = LlamaForCausalLM(CONFIG)
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n) + 32 * 50  # the head is tied
    rows = [(7, [4, 1]), (3, [6])]
    read = 5 * weights
    for step in range(1, 6):
        for prompt, lengths in rows:
            read += sum(2 * 3 * 16 * (prompt + step) for length in lengths if length > step)
    assert decoding_bytes(rows, CONFIG, 2) == 2 * read


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    """DPO: passes forward and backward of the policy, forward of the reference; all weights are one pass more."""
    adapters, all_weights = SEVEN["gpu-dpo-7b"], replace(SEVEN["gpu-dpo-7b"], lora=None)
    forward = forward_flops([(7, [4, 4])], CONFIG, predicts=True)
    assert count_work(adapters, [(7, [4, 4])], CONFIG)["flops"] == 3 * forward
    assert count_work(all_weights, [(7, [4, 4])], CONFIG)["flops"] == 4 * forward


def test_a_gpu_is_held_against_what_it_was_measured_to_do(tmp_path: Path) -> None:
    """Half the rate of products, all of it in the steps after the first; a fifth of the bandwidth in decoding."""
    machine = {"matmul_flops": 1e12, "bandwidth": 1e9}
    dpo, sampling = SEVEN["gpu-dpo-7b"], SEVEN["gpu-sampling-7b"]
    (tmp_path / "rows" / dpo.name).mkdir(parents=True)
    (tmp_path / "rows" / dpo.name / "counts.json").write_text(json.dumps({"flops": 6e12}))
    figures = {"seconds": 12.0, "steps": [8.0, 2.0, 2.0], "peak_memory_mib": 1e9 / 2**20}
    compared = _compare_with_goals(dpo, figures, machine, tmp_path)
    assert compared["share of the product rate"] == pytest.approx(0.5)
    assert compared["share of the product rate after the first step"] == pytest.approx(1.0)
    assert compared["peak GB"] == pytest.approx(1.0)
    assert compared["goal: share of the product rate"] == 0.45
    decoded = {"seconds": 7.0, "prefill_seconds": 2.0, "read": 1e9, "peak_memory_mib": 1.0}
    assert _compare_with_goals(sampling, decoded, machine, tmp_path)["share of the bandwidth"] == pytest.approx(0.2)
    assert _compare_with_goals(dpo, {"failed": "no memory"}, machine, tmp_path) == {}


def test_figures_of_a_part_are_saved_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    results = BenchmarkPartResults("right")
    for name, wrong in (("one", 0.5), ("two", 2.0)):
        results.save(name, _compare([1.0, 1.0 + wrong], [1.0, 1.0], 1.0))
        saved = json.loads((tmp_path / "out" / "gpu-right.json").read_text())
        assert saved["figures"][name] == {"loss": wrong, "limit": 1.0, "right": wrong < 1}
    assert set(saved["figures"]) == {"one", "two"}
    assert torch.__version__.startswith(saved["versions"]["torch"])
    assert {"card", "commit", "when"} <= set(saved)


def result(kind: str = "dpo", **taken: Any) -> dict[str, Any]:
    machine = [{"matmul_flops": 4e9, "bandwidth": 1e9}] * 3
    return {
        "workload": {"name": "tiny", "kind": kind, "precision": "bfloat16"},
        "counts": {"flops": 2e9},
        "taken": {"machine": machine, **taken},
    }


def runs(*seconds: float, **more: Any) -> list[dict[str, Any]]:
    return [{"seconds": each, "rows": 8, "peak_memory_mib": 100.0, **more} for each in seconds]


def test_ratios_are_of_the_same_repetition_and_the_peers_best_setting_counts() -> None:
    found = result(
        mixpo=runs(1.0, 2.0, 4.0, losses=[0.69314]),
        slow=runs(40.0, 40.0, 40.0),
        fast=runs(2.0, 8.0, 20.0, peak_memory_mib=300.0),
        broken=[{"failed": "no such thing"}] * 3,
    )
    shown = format_result(found)
    assert "tiny, pairs/s, bfloat16" in shown
    assert "25% of the 4 GFLOP/s" in shown
    assert "ours/theirs 4.00 (2.00 to 5.00)" in shown
    assert "broken               failed: no such thing" in shown
    line = format_table([found]).splitlines()[-1]
    assert line.startswith("| tiny (bfloat16) | 4.00 pairs/s | 1.00 (fast) | 4.00 (2.00 to 5.00) | 100 MiB | 300 MiB |")
    assert line.endswith("broken failed |")


def test_a_repetition_that_failed_is_in_no_ratio() -> None:
    found = result(mixpo=runs(1.0, 2.0, 4.0), peer=[*runs(2.0), {"failed": "x"}, *runs(4.0)])
    assert "ours/theirs 1.50 (1.00 to 2.00)" in format_result(found)


def test_decoding_is_held_against_the_memory() -> None:
    sampled = runs(3.0, 3.0, 3.0, tokens=30, prefill_seconds=1.0, read=5e8)
    shown = format_result(result("sampling", mixpo=sampled, generate=runs(6.0, 6.0, 6.0, tokens=30)))
    assert "decoding at 25% of the memory bandwidth of 1.0 GB/s" in shown
    assert "tokens/s" in shown
    assert "ours/theirs 2.00" in shown


def test_what_was_not_measured_is_not_shown() -> None:
    line = format_table([result(mixpo=[{"failed": "no memory"}], peer=runs(1.0))]).splitlines()[-1]
    assert line.startswith("| tiny (bfloat16) | failed | 8.00 (peer) | – | – | 100 MiB |")


def test_repetitions_are_added_to_those_of_the_same_work_alone() -> None:
    saved, new = (result("dpo", mixpo=runs(seconds), trl=runs(2 * seconds)) for seconds in (1.0, 2.0))
    both = _merge_results(saved, new)
    assert [one["seconds"] for one in both["taken"]["mixpo"]] == [1.0, 2.0]
    assert [one["seconds"] for one in both["taken"]["trl"]] == [2.0, 4.0]
    other = result("dpo", mixpo=runs(1.0), generate=runs(1.0))
    with pytest.raises(SystemExit, match=r"found saved repetitions with sides \['machine', 'mixpo', 'trl'\]; expected"):
        _merge_results(saved, other)
    with pytest.raises(SystemExit, match="with counts"):
        _merge_results(saved | {"counts": {"pairs": 1}}, new)


def write_inputs(tmp_path: Path) -> None:
    """Write the embedded world's model, a reward model on it, and nine rows."""
    model, tokenizer = initialize_world_model(0)
    folder, rows = tmp_path / "models" / "w" / "model", tmp_path / "rows" / "x"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    reward = ModelLoader(torch.device("cpu")).initialize_reward_model(folder, seed=0)
    save_model(reward, tmp_path / "models" / "w-reward" / "model")
    pairs = [{"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    rows.mkdir(parents=True)
    digest = compute_tokenization_digest(reward.tokenizer)
    for name, part in (("pairs", pairs), ("test", pairs[:1]), ("demonstrations", demonstrations)):
        write_table(rows / f"{name}.parquet", add_token_columns(part, reward.tokenizer), tokenizer=digest)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo"])
def test_our_side_of_a_workload_runs(tmp_path: Path, kind: str) -> None:
    write_inputs(tmp_path)
    sizes = {"batch": 4, "rows": 8, "max_tokens": 32, "new_tokens": 8}
    spec = {"kind": kind, "inputs": str(tmp_path), "model": "w", "name": "x", "precision": "float32", **sizes}
    assert ours.main(spec)["seconds"] > 0


def test_workloads_are_planned_as_a_chain_on_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "models" / "w" / "model")
    base = 4 * sum(weight.numel() for weight in model.parameters()) / 1e9
    planned: dict[tuple[str, int | None], float] = {}
    for rank in (4, None):
        planner = ChainPlanner(tmp_path, "w")
        for kind in ("sft", "reward", "dpo", "ppo", "sampling"):
            one = Workload("x", kind, "w", batch=8, steps=1, new_tokens=8, max_tokens=32, precision="float32")
            planned[kind, rank] = planner.plan(replace(one, lora=rank))["planned GB"]
        ppo = planner.stages["ppo"]
        assert (ppo.policy, ppo.reference) == (planner.stages["dpo"],) * 2
        assert (ppo.sft, ppo.reward) == (planner.stages["sft"], planner.stages["reward"])
        assert ppo.policy.policy == ppo.policy.reference == planner.stages["reward"].policy == ppo.sft
    process = 490 * 2**20 / 1e9
    assert base < planned["ppo", 4] - process < planned["ppo", None] - process
    # policy and value model train, at 16 bytes a weight, and reference, SFT and reward model are frozen
    assert planned["ppo", None] - process > (4 + 4 + 3) * base
    assert planned["sampling", 4] == planned["sampling", None]
    monkeypatch.setattr("benchmarks.plans.find_device_kind", lambda: "cuda")
    on_gpu = ChainPlanner(tmp_path, "w").plan(Workload("x", "sampling", "w", 8, 1, new_tokens=8, precision="float32"))
    assert base < on_gpu["planned GB"] < planned["sampling", None] - process / 2, "no process is counted"


def test_an_error_in_a_plan_comes_before_the_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[str]()

    def plan(planner: ChainPlanner, workload: Workload) -> dict[str, Any]:
        if workload.name == list(SEVEN)[-1]:
            raise RuntimeError("no plan")
        return {}

    def measure(command: list[str], spec: dict[str, Any], *limit: float) -> dict[str, Any]:
        measured.append(spec["name"])
        return {"failed": "not measured"}

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "_prepare", lambda *arguments, **options: None)
    monkeypatch.setattr(gpu, "run_in_worker", measure)
    monkeypatch.setattr(ChainPlanner, "__init__", lambda *arguments: None)
    monkeypatch.setattr(ChainPlanner, "plan", plan)
    with pytest.raises(RuntimeError, match="no plan"):
        gpu.measure_7b(BenchmarkPartResults("seven"), tmp_path, tiny=True)
    assert not measured


@pytest.mark.parametrize("kind", ["update", "sampling"])
def test_growth_is_measured(kind: str) -> None:
    sizes = {"batch": 2, "prompt": 8, "completion": 4, "k": 2, "width": 64, "layers": 2, "vocabulary": 128}
    assert growth.main({"kind": kind, "point": sizes})["flops"] > 0
