"""Peak memory of one stage, and its plan: `python -m benchmarks.memory SPEC` prints one line of JSON.

Models have random weights and the embedded world's tokenizer, so that nothing is downloaded.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.inputs import RANDOM
from benchmarks.worker import run_worker
from mixpo import DPO, PPO, SFT, Data, Pretrained, RewardModel, Runtime, Samples, StageCache
from mixpo.data.world import generate_world_rows
from mixpo.experiments.stage_costs import CostPlanner
from mixpo.models.adapters import LoraSettings
from mixpo.models.sources import initialize_world_model
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import read_stage_summary
from mixpo.training.footprint import PlannedRuntime
from mixpo.training.rates import CARDS

MODELS = {name: RANDOM[name] for name in ("20m", "135m")}
"""Sizes of the Llamas beside `world`; the second is SmolLM2-135M's."""
VOCABULARY = 49_152
ROWS, TEST_ROWS = 72, 8
SENTENCES = {"world": (1, 1), "20m": (6, 6), "135m": (6, 6)}
"""Dialogues of the world that are joined for a prompt and for a completion."""


KINDS = ("data", "sft", "reward", "samples", "dpo", "ppo")
"""Stages in an order in which each finds its inputs computed."""
MICROBATCH_TOKENS = {"world": 2048, "20m": 2048, "135m": 1024}


@dataclass(frozen=True)
class MemoryCase:
    """One stage of one model, whole or with LoRA, in one precision."""

    model: str
    kind: str
    lora: bool
    precision: str

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one backward pass."""
        return MICROBATCH_TOKENS[self.model]


def list_cases(models: Sequence[str], ways: Sequence[str], precisions: Sequence[str]) -> Iterator[MemoryCase]:
    """List the cases of some models, `whole` or with `lora`, each after those that compute its inputs."""
    for model, way, precision, kind in product(models, ways, precisions, KINDS):
        yield MemoryCase(model, kind, way == "lora", precision)


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Format plans and peaks as a table in Markdown: both whole, and without what a process takes without models.

    The second is left out where that is more than twice as much as all the rest.
    """
    lines = [
        "| model | stage | | precision | peak, MiB | plan, MiB | plan / peak | without the process | fullest moment |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        peak, plan, process = one["peak_mib"], one["planned_mib"], one["planned_process_mib"]
        cells = [one["model"], one["kind"], "LoRA" if one["lora"] else "whole", one["precision"]]
        without_process = f"{(plan - process) / (peak - process):.2f}" if 3 * process < 2 * peak else "–"
        cells += [f"{peak:,.0f}", f"{plan:,.0f}", f"{plan / peak:.2f}", without_process]
        lines.append(f"| {' | '.join([*cells, one['moment']])} |")
    return "\n".join(lines)


def build_stages(case: MemoryCase, work: Path) -> dict[str, Stage]:
    """Build the stages of a case, by kind."""
    base = Pretrained(path="world" if case.model == "world" else str(work / case.model))
    rows = work / f"{case.model}-rows.jsonl"
    data = Data(base=base, format="preference", train=(str(rows),), test_rows=TEST_ROWS, test_share=0.2)
    common = {"precision": case.precision, "max_completion_tokens": 128 if case.model != "world" else 48}
    lora = LoraSettings(rank=8) if case.lora else None
    training: dict[str, Any] = {**common, "lora": lora, "batch_size": 24, "warmup_steps": 0, "learning_rate": 1e-5}
    sft = SFT(base=base, data=data, **training)
    reward = RewardModel(policy=sft, pairs=data.train_pairs, data=data, **training)
    samples = Samples(policy=sft, reward=reward, rows=data.train_pairs, prompts=32, **common)
    dpo = DPO(policy=sft, reference=sft, pairs=data.train_pairs, samplings=1, **training)
    ppo = PPO(policy=dpo, reference=dpo, sft=sft, reward=reward, prompts=data.train_pairs, **training, max_kl=1e9)
    return {"base": base, "data": data, "sft": sft, "reward": reward, "samples": samples, "dpo": dpo, "ppo": ppo}


def prepare_case(case: MemoryCase, work: Path) -> None:
    """Write a case's model and rows, unless they are there."""
    rows = work / f"{case.model}-rows.jsonl"
    if rows.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    if case.model != "world":
        tokenizer = initialize_world_model(0)[1]
        config = LlamaConfig(
            **MODELS[case.model],
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(work / case.model)
        tokenizer.save_pretrained(work / case.model)
    prompt_dialogues, completion_dialogues = SENTENCES[case.model]
    count = ROWS * max(prompt_dialogues, completion_dialogues)
    pairs = generate_world_rows(demonstration_count=0, train_count=count, test_count=0, seed=0).train
    with rows.open("w", encoding="utf8") as file:
        for row in range(ROWS):
            part = pairs[row * max(prompt_dialogues, completion_dialogues) :]
            prompt = " ".join(prompt for prompt, _, _ in part[:prompt_dialogues])
            sides = [" ".join(pair[side] for pair in part[:completion_dialogues]) for side in (1, 2)]
            file.write(json.dumps({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}) + "\n")


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Compute a case's stage, whose inputs are computed before if they are not, and plan it."""
    case, work = MemoryCase(**spec["case"]), Path(spec["work"])
    prepare_case(case, work)
    stages = build_stages(case, work)
    stage_cache = StageCache(work / "cache", Runtime(microbatch_tokens=case.microbatch_tokens, threads=1))
    stage = stages[case.kind]
    for needed in stage.get_input_stages().values():
        stage_cache.compute_with_inputs(needed)
    shutil.rmtree(stage_cache.locate_folder(stage), ignore_errors=True)
    stage_cache.compute_stage(stage)
    runtime = PlannedRuntime(
        microbatch_tokens=case.microbatch_tokens, sampling_bytes=stage_cache.runtime.sampling_bytes
    )
    cost = CostPlanner(stage_cache, runtime, lambda _: CARDS["h100"]).plan_stage(stage)
    if cost is None:
        return {}
    return {
        **asdict(case),
        "peak_mib": read_stage_summary(stage_cache.locate_folder(stage))["cost"]["peak_memory_mib"],
        "planned_mib": cost.footprint.total / 2**20,
        "planned_process_mib": cost.footprint.process / 2**20,
        "moment": cost.moment,
        "parts_mib": {name: value / 2**20 for name, value in asdict(cost.footprint).items()},
    }


if __name__ == "__main__":
    run_worker(main)
