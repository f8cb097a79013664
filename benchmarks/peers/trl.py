"""One workload with TRL's trainers (SFT, reward model, DPO), in the peer's own environment."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.worker import answer


class Losses(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep a step's loss."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


class TimedDPOTrainer(DPOTrainer):
    """Knows how long the reference's log-probs took that are computed when it is built."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **more)
        self.reference_seconds += time.perf_counter() - started
        return found


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `train()`, and of the reference's log-probs; trainers are built, and rows tokenised, before."""
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
    losses = Losses()
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
    answer(main)
