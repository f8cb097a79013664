"""DPO: direct preference optimization on any pairs, from any policy, with any reference (Rafailov et al. 2023)."""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.algorithms.preference import dpo_loss, implicit_rewards
from mixpo.data.branches import BranchBatch
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.models.adapters import LoraSettings
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.scoring import compute_sequence_logprobs
from mixpo.stages.rows import TokenizedPairs, format_sampler_name, read_pairs
from mixpo.stages.stage import Part, PolicyStage
from mixpo.training.health import compute_mean_of_last_steps, emit_alarms, find_policy_alarms
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.record import StepLog
from mixpo.training.resumable_work import ResumableWork
from mixpo.training.step import Sums
from mixpo.training.supervised import SupervisedSettings, SupervisedTraining

CHECKED_PAIRS = 8
"""Pairs whose log-probs from sampling are compared with a forward pass before they are used."""
PROBED_PROMPTS = 8
"""Training prompts of which completions are sampled during training."""
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference between a log-prob from sampling and one from a forward pass, in nats a token."""


class DPOSettings(SupervisedSettings):
    """Settings of direct preference optimization."""

    beta: float = pydantic.Field(0.1, gt=0)
    """Scale of the implicit reward."""
    learning_rate: float = pydantic.Field(5e-6, gt=0)
    batch_size: int = pydantic.Field(16, ge=1)
    warmup_steps: int = pydantic.Field(100, ge=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    samplings: int = pydantic.Field(4, ge=0)
    """Number of times during training that completions of a few prompts are sampled and written to `samples.jsonl`."""
    lora: LoraSettings | None = None


class DPO(PolicyStage, DPOSettings):
    """Stage of a policy trained by DPO (equation 2 of the paper), with an explicit reference."""

    shares_equal_reference = True

    policy: PolicyStage
    reference: PolicyStage
    pairs: Part

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Train a policy by DPO, and write `model/` and `samples.jsonl`."""
        torch.manual_seed(self.seed)
        lm = job.load_trainable_policy(input_paths["policy"], self.precision, self.lora)
        pairs = read_pairs(input_paths["pairs"], lm, max_completion_tokens=self.max_completion_tokens)
        resumable = ResumableWork(job)
        reference_logprobs = _compute_reference_logprobs(self, input_paths, lm, pairs, job, resumable)
        training = SupervisedTraining(job, self, lm, pairs.prompts, pairs.completions)
        samples = StepLog(job.out / "samples.jsonl", resumed_at=training.first_step, processes=job.processes)
        probe_steps = {training.total_steps * part // self.samplings for part in range(1, self.samplings + 1)}

        def compute_dpo_loss(batch: BranchBatch, rows: list[int]) -> tuple[Tensor, Sums]:
            """Summed DPO loss of a microbatch, and the sums of its metrics."""
            chosen, rejected = lm(batch, "logprobs").sum(dim=-1).unbind(dim=1)
            chosen_reference, rejected_reference = reference_logprobs[rows].to(lm.device).unbind(dim=1)
            losses = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, beta=self.beta)
            with torch.no_grad():
                chosen_reward = implicit_rewards(chosen, chosen_reference, beta=self.beta)
                rejected_reward = implicit_rewards(rejected, rejected_reference, beta=self.beta)
                number = torch.tensor(len(rows))
                metrics = {
                    "accuracy": ((chosen_reward > rejected_reward).sum(), number),
                    "margin": ((chosen_reward - rejected_reward).sum(), number),
                    "chosen_reward": (chosen_reward.sum(), number),
                    "rejected_reward": (rejected_reward.sum(), number),
                    "chosen_logprob": (chosen.sum(), number),
                    "rejected_logprob": (rejected.sum(), number),
                }
            return losses.sum(), metrics

        for step, metrics in training.train_remaining_steps(compute_dpo_loss, compute_divisor=len):
            if step + 1 in probe_steps:
                metrics |= _sample_training_prompts(self, lm, pairs, job, step, samples)

        digest = job.save_model(lm)
        rows = training.metrics.read_steps()
        figures = {name: compute_mean_of_last_steps(rows, name) for name in ("loss", "accuracy", "margin")}
        remedies = {
            "end_rate": f"a higher max_completion_tokens (now {self.max_completion_tokens}), a lower learning_rate "
            f"(now {self.learning_rate:g}) or a higher beta (now {self.beta:g})"
        }
        job.finish_stage(
            model=digest,
            pairs=len(pairs.prompts),
            truncated=pairs.truncated,
            identical=pairs.identical,
            steps=training.total_steps,
            alarms=emit_alarms(find_policy_alarms(rows, remedies)),
            reference_seconds=resumable.seconds["reference"],
            **figures,
        )


def _compute_reference_logprobs(
    stage: DPO,
    input_paths: Mapping[str, Path],
    lm: LanguageModel,
    pairs: TokenizedPairs,
    job: StageJob,
    resumable: ResumableWork,
) -> Tensor:
    """Log-probs of both completions of all pairs under the reference, [pairs, 2], in nats.

    If the reference itself sampled the pairs, the log-probs from sampling are returned, after a few of them were
    compared with a forward pass. Raises RuntimeError if they differ.
    """
    digest = compute_model_digest(locate_model_folder(input_paths["reference"]))
    same = digest == compute_model_digest(locate_model_folder(input_paths["policy"]))
    shared = same and not stage.lora  # nothing is trained yet
    reference = lm if shared else job.load_policy(input_paths["reference"], stage.precision, stage.lora)
    quantized = stage.lora is not None and stage.lora.quantize_base  # pairs are sampled from whole weights
    sampled = pairs.sampler == format_sampler_name(digest, stage.precision) and not quantized
    stored = pairs.logprobs if sampled else None
    selected = draw_subset(range(len(pairs.prompts)), None if stored is None else CHECKED_PAIRS, COMPARISON_SEED)
    prompts, completions = [pairs.prompts[row] for row in selected], [pairs.completions[row] for row in selected]
    computed = resumable.score_in_portions("reference", compute_sequence_logprobs, reference, prompts, completions)
    if stored is None:
        return computed
    lengths = torch.tensor([[len(completion) for completion in branches] for branches in completions])
    difference = ((torch.tensor(stored)[selected] - computed).abs() / lengths).max()
    if float(difference) > LOGPROB_TOLERANCE[stage.precision]:
        resumable.path.unlink(missing_ok=True)  # the samples may differ at the next attempt
        raise RuntimeError(
            f"log-probs from sampling differ from a forward pass of the reference by {float(difference):.3g} nats a "
            f"token; expected at most {LOGPROB_TOLERANCE[stage.precision]}; delete the samples' folder to sample again"
        )
    return torch.tensor(stored)


def _sample_training_prompts(
    stage: DPO, lm: LanguageModel, pairs: TokenizedPairs, job: StageJob, step: int, log: StepLog
) -> dict[str, float]:
    """Sample completions of a few train prompts into the log; returns their end rate and length as metrics."""
    rows = draw_subset(range(len(pairs.prompts)), PROBED_PROMPTS, COMPARISON_SEED)
    prompts = [pairs.prompts[row] for row in rows]
    sampler = job.get_sampler()
    sampler.load_policy(lm)
    sampled = sampler.draw(prompts, k=1, max_tokens=stage.max_completion_tokens, seed=stage.seed)
    job.cost.add_sampled_tokens(lm, int(sampled.mask.sum()), sum(map(len, prompts)))
    texts = [lm.decode_completion(completion) for (completion,) in sampled.to_lists()]
    log.append_rows(
        [
            {"step": step, "prompt": pairs.prompt_texts[row], "completion": text}
            for row, text in zip(rows, texts, strict=True)
        ]
    )
    return {
        "sampled_end_rate": float(sampled.ended.float().mean()),
        "sampled_tokens": float(sampled.lengths.float().mean()),
    }
