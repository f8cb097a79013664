"""RewardModel: a Bradley-Terry reward model trained on human pairs, from the SFT model."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from mixpo.algorithms.calibration import bin_accuracy_by_gap
from mixpo.algorithms.intervals import wilson_interval
from mixpo.algorithms.preference import bradley_terry_loss, centering_loss, fit_bradley_terry
from mixpo.data.branches import BranchBatch, count_tokens_per_prompt
from mixpo.data.splits import split_by_prompt
from mixpo.models.adapters import LoraSettings
from mixpo.models.scoring import compute_last_states, compute_scores
from mixpo.stages.rows import read_pairs, write_table
from mixpo.stages.stage import DataStage, Part, PolicyStage, RewardStage
from mixpo.training.health import compute_mean_of_last_steps, emit_alarms, find_reward_model_alarms
from mixpo.training.job import StageJob
from mixpo.training.sharding import get_local, take_local_shard
from mixpo.training.step import Sums
from mixpo.training.supervised import SupervisedSettings, SupervisedTraining

GAP_EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Left edges of the bins of the paper's Figure 2; the last bin is open."""


class RewardModelSettings(SupervisedSettings):
    """Settings of reward-model training: optimizer, validation share, initial head."""

    learning_rate: float = pydantic.Field(5e-6, gt=0)
    batch_size: int = pydantic.Field(8, ge=1)
    warmup_steps: int = pydantic.Field(500, ge=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    validation_share: float = pydantic.Field(0.05, gt=0, lt=1)
    """Share of the train prompts held out for validation, with all their pairs."""
    center_coef: float = pydantic.Field(0.0, ge=0)
    """Weight of the loss that keeps the scores' mean near 0, where PPO's score_clip is even-handed; 0.01 is usual."""
    head: Literal["random", "fitted"] = "random"
    """`fitted` starts from the head that is best on the frozen model's states (a ridge regression, one forward pass):
    worth it where pairs are few, since a random one has to be unlearnt (Kumar et al. 2022)."""
    head_ridge: float = pydantic.Field(0.3, gt=0)
    """Weight of the penalty on a fitted head."""
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    lora: LoraSettings | None = None


class RewardModel(RewardStage, RewardModelSettings):
    """Stage of a reward model trained by equation 1 of the paper; its score is read at a completion's last token."""

    policy: PolicyStage
    """Policy with the initial weights."""
    pairs: Part
    data: DataStage
    """Data with the test pairs that are scored at the end."""

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Train a reward model, and write `model/` and the scores of validation and test pairs."""
        torch.manual_seed(self.seed)
        lm = job.initialize_reward_model(
            input_paths["policy"], seed=self.seed, precision=self.precision, lora=self.lora
        )
        pairs = read_pairs(input_paths["pairs"], lm, max_completion_tokens=self.max_completion_tokens)
        test = read_pairs(input_paths["data"] / "test.parquet", lm, max_completion_tokens=self.max_completion_tokens)
        train, validation = split_by_prompt(
            list(map(tuple, pairs.prompts)),
            self.validation_share,
            self.seed,
            setting_name="reward.validation_share",
            remedy="add pairs with other prompts to the train rows (those of a second reward model: raise "
            "data.second_rows)",
        )
        prompts, completions = [pairs.prompts[row] for row in train], [pairs.completions[row] for row in train]
        training = SupervisedTraining(job, self, lm, prompts, completions)
        if self.head == "fitted" and training.first_step == 0:
            states = job.compute_over_processes(compute_last_states, lm, prompts, completions)
            job.cost.add_scored_tokens(lm, sum(count_tokens_per_prompt(prompts, completions)))
            weight = lm.score_head.weight.detach()
            fitted = fit_bradley_terry(states[:, 0] - states[:, 1], ridge=self.head_ridge)
            get_local(weight).copy_(take_local_shard(fitted.view_as(weight), weight))

        def compute_reward_loss(batch: BranchBatch, rows: list[int]) -> tuple[Tensor, Sums]:
            """Bradley-Terry and weighted centering loss, summed over a microbatch, and the sums of its metrics."""
            chosen, rejected = lm(batch, "scores").unbind(dim=1)
            number = torch.tensor(len(rows))
            metrics = {
                "accuracy": ((chosen > rejected).sum(), number),
                "margin": ((chosen - rejected).sum().detach(), number),
                "score": ((chosen + rejected).sum().detach() / 2, number),
            }
            losses = bradley_terry_loss(chosen, rejected)
            if self.center_coef:
                losses = losses + self.center_coef * centering_loss(chosen, rejected)
            return losses.sum(), metrics

        for _ in training.train_remaining_steps(compute_reward_loss, compute_divisor=len):
            pass

        digest = job.save_model(lm)
        saved = job.load_reward_model(job.out, self.precision, self.lora)
        accuracies: dict[str, Any] = {}
        for name, prompts, completions in (
            ("validation", [pairs.prompts[row] for row in validation], [pairs.completions[row] for row in validation]),
            ("test", test.prompts, test.completions),
        ):
            scores = job.compute_over_processes(compute_scores, saved, prompts, completions).double().numpy()
            job.cost.add_scored_tokens(saved, sum(count_tokens_per_prompt(prompts, completions)))
            if job.processes.is_main_process:
                write_table(
                    job.out / f"{name}_scores.parquet",
                    [{"chosen_score": float(chosen), "rejected_score": float(rejected)} for chosen, rejected in scores],
                )
            accuracies[name] = _summarize_accuracy(scores)
        accuracies["test"].update(truncated=test.truncated, identical=test.identical)
        accuracy, (low, _) = accuracies["test"]["accuracy"], accuracies["test"]["accuracy_interval"]
        train_accuracy = compute_mean_of_last_steps(training.metrics.read_steps(), "accuracy")
        job.finish_stage(
            model=digest,
            pairs=len(train),
            truncated=pairs.truncated,
            identical=pairs.identical,
            steps=training.total_steps,
            alarms=emit_alarms(find_reward_model_alarms(accuracy, low, train_accuracy=train_accuracy)),
            **accuracies,
        )


def _summarize_accuracy(pair_scores: "np.ndarray[Any, np.dtype[np.float64]]") -> dict[str, Any]:
    """Accuracy on scored pairs [pairs, (chosen, rejected)] with its interval and by bins of the gap, as a dict."""
    margins = pair_scores[:, 0] - pair_scores[:, 1]
    correct = int((margins > 0).sum())
    interval = wilson_interval(correct, len(margins))
    return {
        "pairs": len(margins),
        "accuracy": correct / len(margins),
        "accuracy_interval": [interval.low, interval.high],
        "gap_under_1": float((np.abs(margins) < 1).mean()),
        "score_mean": float(pair_scores.mean()),
        "score_std": float(pair_scores.std()),
        "by_gap": [asdict(row) for row in bin_accuracy_by_gap(margins, GAP_EDGES)],
    }
