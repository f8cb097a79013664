"""One workload with mixpo: `python -m benchmarks.ours SPEC` prints one line of JSON."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.mathematics import decoding_bytes
from benchmarks.worker import run_worker
from mixpo.models.folders import load_tokenizer
from mixpo.models.loading import ModelLoader
from mixpo.models.sampling import sample_completions
from mixpo.stages.dpo import DPO
from mixpo.stages.ppo import PPO
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.reward_model import RewardModel
from mixpo.stages.sft import SFT
from mixpo.stages.stage import DataStage, Part, PolicyStage, RewardStage, Stage
from mixpo.training.job import StageJob
from mixpo.training.runtime import Runtime

SAMPLED_TOKENS = 1 << 20
"""Tokens in the key-value cache while sampling: all of them."""


class WorkloadRows(DataStage):
    """A workload's rows, which are written beforehand."""

    parts = ("pairs",)


class WorkloadRewardModel(RewardStage):
    """A workload's reward model, which is written beforehand."""


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure seconds, rows and tokens; loading, tokenizing and saving are not timed, nor are they for peers.

    Of the specification, `folders` are input folders of the stage by name, instead of the workload's, `out` is a
    folder in which the stage stays and from which it resumes, `stage_settings` are further settings of the stage.
    """
    inputs = Path(spec["inputs"])
    if spec["kind"] == "sampling":
        return _measure_sampling(spec, inputs)
    model, reward = inputs / "models" / spec["model"], inputs / "models" / f"{spec['model']}-reward"
    stage = build_stage(spec, Pretrained(path=str(model / "model")))
    rows = inputs / "rows" / spec["name"]
    folders = {"policy": model, "reference": model, "base": model, "sft": model, "reward": reward, "data": rows}
    folders |= {"pairs": rows / "pairs.parquet", "prompts": rows / "pairs.parquet"}
    folders |= {name: Path(folder) for name, folder in spec.get("folders", {}).items()}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(spec.get("out", temporary))
        out.mkdir(parents=True, exist_ok=True)
        job = StageJob(out, Runtime(**spec.get("runtime", {})))
        stage.compute({name: folders[name] for name in stage.get_input_stages()}, job)
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
        summary = json.loads((out / "summary.json").read_text(encoding="utf8"))
    reference_seconds = summary.get("reference_seconds", 0.0)
    return {
        "seconds": reference_seconds + sum(step["seconds"] for step in steps),
        "rows": spec["rows"],
        "tokens": sum(step["tokens"] for step in steps),
        "losses": [step["loss"] for step in steps],
        "steps": [step["seconds"] for step in steps],
    }


def build_stage(
    spec: dict[str, Any],
    policy: PolicyStage,
    *,
    sft: PolicyStage | None = None,
    reward: RewardStage | None = None,
) -> Stage:
    """Build a workload's stage, which starts from the policy; that is its reference too, and SFT's if none is given."""
    data = WorkloadRows()
    pairs = Part(stage=data, of="pairs")
    common = {
        "batch_size": spec["batch"],
        "precision": spec["precision"],
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "max_completion_tokens": spec["max_tokens"],
        "lora": {"rank": spec["lora"]} if spec.get("lora") else None,
        **spec.get("stage_settings", {}),
    }
    if spec["kind"] == "sft":
        return SFT(base=policy, data=data, epochs=1, **common)
    if spec["kind"] == "reward":
        return RewardModel(policy=policy, pairs=pairs, data=data, validation_share=1e-9, **common)
    if spec["kind"] == "dpo":
        return DPO(policy=policy, reference=policy, pairs=pairs, samplings=0, **common)
    common["max_completion_tokens"] = spec["new_tokens"]
    models = {"policy": policy, "reference": policy, "sft": sft or policy, "reward": reward or WorkloadRewardModel()}
    return PPO(**models, prompts=pairs, **common)


def _measure_sampling(spec: dict[str, Any], inputs: Path) -> dict[str, Any]:
    """Measure the seconds of sampling and of its prefill, and count the tokens."""
    runtime = Runtime(**spec.get("runtime", {}))
    device = runtime.set_up_processes().device
    model = inputs / "models" / spec["model"] / "model"
    lm = ModelLoader(device).load_policy(model, precision=spec["precision"])
    texts = json.loads((inputs / "rows" / spec["name"] / "prompts.json").read_text(encoding="utf8"))
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    how: dict[str, Any] = {"k": 1, "seed": 0, "token_budget": SAMPLED_TOKENS, "fixed_shapes": runtime.cuda_graphs}
    if device.type == "cuda":
        sample_completions(lm, prompts, max_tokens=2, **how)  # compiles the prefill's attention
    started = time.perf_counter()
    sampled = sample_completions(lm, prompts, max_tokens=spec["new_tokens"], **how)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    sample_completions(lm, prompts, max_tokens=1, **how)
    prefill = time.perf_counter() - started
    lengths = [(len(prompt), row) for prompt, row in zip(prompts, sampled.lengths.tolist(), strict=True)]
    itemsize = getattr(torch, spec["precision"]).itemsize
    return {
        "seconds": seconds,
        "prefill_seconds": prefill,
        "read": decoding_bytes(lengths, lm.model.config, itemsize),
        "rows": len(prompts),
        "tokens": sum(completion for _, (completion,) in lengths),
        "losses": [],
    }


if __name__ == "__main__":
    run_worker(main)
