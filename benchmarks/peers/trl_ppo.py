"""PPO with the experimental trainer of TRL 1.9.2, the last version that has one."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.worker import run_worker


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds of `train()`: iterations of sampling, scoring and one update."""
    inputs = Path(spec["inputs"])
    model, reward = (inputs / "models" / name / "model" for name in (spec["model"], f"{spec['model']}-reward"))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = json.loads((inputs / "rows" / spec["name"] / "prompts.json").read_text(encoding="utf8"))
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])

    def load_policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def load_reward() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)

    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=len(texts),
        local_rollout_forward_batch_size=spec["batch"],
        response_length=spec["new_tokens"],
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=1e-6,
        bf16=spec["precision"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **spec["settings"],
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=load_policy(),
        ref_model=load_policy(),
        reward_model=load_reward(),
        value_model=load_reward(),
        train_dataset=data,
        eval_dataset=data.select(range(min(2, len(data)))),
    )
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started, "rows": len(texts), "losses": []}


if __name__ == "__main__":
    run_worker(main)
