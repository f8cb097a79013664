"""One workload with TRL's trainers for SFT, reward models and DPO."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.worker import run_worker


class LossRecorder(TrainerCallback):
    """A callback that records the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record a step's loss."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


class TimedDPOTrainer(DPOTrainer):
    """A DPO trainer that measures the seconds of the reference's log-probs."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        logprobs = super()._precompute_ref_logps(*args, **more)
        self.reference_seconds += time.perf_counter() - started
        return logprobs


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds of `train()` and of the reference's log-probs, without making the trainer."""
    inputs = Path(spec["inputs"])
    model = inputs / "models" / spec["model"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = json.loads((inputs / "rows" / spec["name"] / "pairs.json").read_text(encoding="utf8"))
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": spec["batch"],
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "bf16": spec["precision"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": spec["max_tokens"],
        **spec["settings"],
    }
    losses = LossRecorder()
    if spec["kind"] == "reward":
        network = AutoModelForSequenceClassification.from_pretrained(
            inputs / "models" / f"{spec['model']}-reward" / "model", num_labels=1, dtype=torch.float32
        )
        trainer: Any = RewardTrainer(
            model=network,
            args=RewardConfig(**common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[losses],
        )
    else:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if spec["kind"] == "dpo":
            trainer = TimedDPOTrainer(
                model=network,
                args=DPOConfig(beta=0.1, **common),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[losses],
            )
        else:
            chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
            trainer = SFTTrainer(
                model=network,
                args=SFTConfig(completion_only_loss=True, **common),
                train_dataset=Dataset.from_list(chosen),
                processing_class=tokenizer,
                callbacks=[losses],
            )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started + getattr(trainer, "reference_seconds", 0.0)
    return {"seconds": seconds, "rows": len(rows), "losses": losses.losses}


if __name__ == "__main__":
    run_worker(main)
