"""PPO on any prompts, from any policy, with a KL penalty to any reference. Equation 3 of the paper.

An iteration is `PPOTraining.roll_out` (sample, score, shape rewards, compute advantages) and then
`PPOTraining.update_on_rollout` (update policy and value). Every tensor of per-token numbers is [prompts, k, tokens].
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixpo.algorithms.kl import adapt_kl_coef, compute_sft_anchor_weight, kl_k3, update_kl_budget_controller
from mixpo.algorithms.masked import whiten
from mixpo.algorithms.ppo import (
    clip_fraction,
    explained_variance,
    generalized_advantages,
    grpo_advantages,
    policy_loss,
    rloo_advantages,
    shaped_rewards,
    truncated_importance_weights,
    value_loss,
)
from mixpo.data.branches import BranchBatch, count_tokens_per_prompt
from mixpo.data.rows import Prompt
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import SampledCompletions
from mixpo.models.scoring import compute_outputs, compute_scores, compute_token_logprobs, retokenize_for_reward
from mixpo.stages.ppo_kl import check_kl_limits, compute_kl_metrics, compute_sampler_mismatch
from mixpo.stages.ppo_models import ActorCritic, FrozenModels, load_frozen_models, make_actor_critic
from mixpo.stages.ppo_settings import (
    PPOSettings,
    choose_snapshot_steps,
    count_updates_before_iterations,
    suggest_ppo_remedies,
    suggest_remedies_by_metric,
)
from mixpo.stages.rows import read_unique_prompts
from mixpo.stages.stage import Part, PolicyStage, RewardStage, Snapshot
from mixpo.training.checkpoint import Checkpoint, LastGoodWeights, TrainableWeights
from mixpo.training.health import compute_mean_of_last_steps, emit_alarms, find_policy_alarms
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.record import MetricsLog, StepLog
from mixpo.training.step import (
    Diverged,
    Sums,
    compute_learning_rate,
    iterate_microbatches,
    select_batch_rows,
    take_optimizer_step,
)


class PPO(PolicyStage, PPOSettings):
    """Stage of a policy trained by PPO: score minus kl_coef times the KL to the reference (equation 3 of the paper)."""

    policy: PolicyStage
    reference: PolicyStage
    sft: PolicyStage
    """The KL from it is a metric, and controlled if kl_budget is set."""
    reward: RewardStage
    prompts: Part
    snapshots: int = pydantic.Field(0, ge=0)
    """Number of policies saved during training, at equal distances."""

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Train a policy by PPO, and write `model/` and `completions.jsonl`, one completion of each iteration."""
        torch.manual_seed(self.seed)
        policy = job.load_trainable_policy(input_paths["policy"], self.precision, self.lora)
        start, reference = (
            compute_model_digest(locate_model_folder(input_paths[name])) for name in ("policy", "reference")
        )
        frozen = load_frozen_models(self, input_paths, policy, job)
        models = make_actor_critic(self, input_paths, policy, frozen.reward, job)
        prompts, prompt_tokens = read_unique_prompts(input_paths["prompts"], policy.tokenizer)
        training = PPOTraining(job, self, models, frozen, prompts, prompt_tokens)
        total = training.total_steps
        snapshot_steps = choose_snapshot_steps(self.snapshots, total)

        checkpoint = Checkpoint(job, models.collect_checkpoint_parts())
        first_step, extra = checkpoint.restore_states()
        if extra:
            job.cost.restore_counts(extra["cost"])
            models.kl_coef, models.kl_multiplier, models.kl_error_sum = extra["kl"]
        examples = StepLog(job.out / "completions.jsonl", resumed_at=first_step, processes=job.processes)
        log = MetricsLog(job.out, resumed_at=first_step, processes=job.processes)
        last_good = LastGoodWeights(TrainableWeights(policy), job.processes)

        for step in range(first_step, total):
            rows = select_batch_rows(step, len(prompts), batch_size=self.batch_size, seed=self.seed)
            try:
                rollout, metrics = training.roll_out(step, rows)
                check_kl_limits(self, metrics, iteration=step, starts_at_reference=start == reference)
                last_good.copy_if_cheap(step)
                metrics |= training.update_on_rollout(step, rollout)
            except Diverged as error:
                stopped = job.out / "stopped"
                last_good.restore()
                job.save_model(policy, stopped)
                kept = step if last_good.step is None else last_good.step
                raise Diverged(
                    f"step {step + 1} of {total}: {error}; try "
                    f"{suggest_ppo_remedies(self, training.updates_before, step)}; the policy before step {kept + 1} "
                    f"is in {stopped}"
                ) from error
            training.adapt_kl_penalty(metrics)
            metrics["seconds"] = metrics["sampling_seconds"] + metrics["updating_seconds"]
            text = policy.decode_completion(rollout.completions.to_lists()[0][0])
            row = {"step": step, "prompt": prompts[rows[0]], "completion": text}
            examples.append_rows([row])
            log.append_step(step, total, metrics)
            if step + 1 in snapshot_steps:
                snapshot = Snapshot(stage=self, number=snapshot_steps.index(step + 1) + 1)
                job.save_model(policy, locate_model_folder(snapshot.get_path_within(job.out)))
            kl_state = [models.kl_coef, models.kl_multiplier, models.kl_error_sum]
            checkpoint.write_checkpoint_if_due(step + 1, {"cost": job.cost.get_counts(), "kl": kl_state})

        digest, metrics_rows = job.save_model(policy), log.read_steps()
        names = ("score", "reward", "kl", "kl_from_sft", "entropy", "end_rate", "completion_tokens")
        job.finish_stage(
            model=digest,
            prompts=len(prompts),
            steps=total,
            snapshots=snapshot_steps,
            alarms=emit_alarms(find_policy_alarms(metrics_rows, suggest_remedies_by_metric(self))),
            **{name: compute_mean_of_last_steps(metrics_rows, name) for name in names},
        )


@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled completions of one PPO iteration, with advantages, values and returns per token."""

    prompts: list[list[int]]
    completions: SampledCompletions
    logprobs: Float[Tensor, "prompts k tokens"]
    """Of the policy before the update, as it computes them itself."""
    advantages: Float[Tensor, "prompts k tokens"]
    values: Float[Tensor, "prompts k tokens"] | None
    returns: Float[Tensor, "prompts k tokens"] | None
    importance_weights: Float[Tensor, "prompts k tokens"] | None
    """Factors of the policy loss, for completions of another engine; None for 1."""


class PPOTraining:
    """Models, prompts, schedule and cost of PPO; an iteration is `roll_out` and then `update_on_rollout`."""

    def __init__(
        self,
        job: StageJob,
        settings: PPOSettings,
        models: ActorCritic,
        frozen: FrozenModels,
        prompts: Sequence[Prompt],
        prompt_tokens: Sequence[list[int]],
    ) -> None:
        self.job, self.settings, self.models, self.frozen = job, settings, models, frozen
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.sampler, self.cost = job.get_sampler(settings.sampler), job.cost
        self.total_steps = max(1, round(settings.epochs * -(-len(prompts) // settings.batch_size)))
        self.updates_before = count_updates_before_iterations(settings, len(prompts), self.total_steps)

    @torch.no_grad()
    def roll_out(self, iteration: int, prompt_indices: Sequence[int]) -> tuple[Rollout, dict[str, float]]:
        """Sample completions, score them, shape rewards and compute advantages; returns the rollout and metrics."""
        started = time.perf_counter()
        settings, models, frozen, job = self.settings, self.models, self.frozen, self.job
        policy, prompts = models.policy, [self.prompt_tokens[row] for row in prompt_indices]

        # Sample
        self.sampler.load_policy(policy)
        completions = self.sampler.draw(
            prompts,
            k=settings.completions_per_prompt,
            max_tokens=settings.max_completion_tokens,
            seed=-1 - settings.seed * 1_000_003 - iteration,  # below 0: seeds from 0 on are those of other stages
        )
        mask, logprobs = completions.mask, completions.logprobs
        tokens = sum(map(len, prompts)) + int(mask.sum())
        self.cost.add_sampled_tokens(policy, int(mask.sum()), sum(map(len, prompts)))
        importance_weights, mismatch = None, dict[str, float]()
        if settings.sampler != "local":
            logprobs = job.compute_over_processes(compute_token_logprobs, policy, prompts, completions)
            self.cost.add_scored_tokens(policy, tokens)
            mismatch = compute_sampler_mismatch(logprobs, completions.logprobs, mask)
            if settings.importance_clip is not None:
                importance_weights = truncated_importance_weights(
                    logprobs, completions.logprobs, clip=settings.importance_clip
                )

        # Score
        rows_text = [self.prompts[row] for row in prompt_indices]
        reward_inputs = retokenize_for_reward(frozen.reward, policy, rows_text, prompts, completions)
        scores = job.compute_over_processes(compute_scores, frozen.reward, *reward_inputs)
        self.cost.add_scored_tokens(frozen.reward, sum(count_tokens_per_prompt(*reward_inputs)))
        reference_logprobs = job.compute_over_processes(compute_token_logprobs, frozen.reference, prompts, completions)
        self.cost.add_scored_tokens(frozen.reference, tokens)
        if frozen.sft is frozen.reference:
            sft_logprobs = reference_logprobs
        else:
            sft_logprobs = job.compute_over_processes(compute_token_logprobs, frozen.sft, prompts, completions)
            if settings.kl_budget is not None:  # otherwise only a metric, which is not a cost of the method
                self.cost.add_scored_tokens(frozen.sft, tokens)

        # Shape rewards
        anchor_logprobs = reference_logprobs.lerp(sft_logprobs, compute_sft_anchor_weight(models.kl_multiplier))
        kl_coef = models.kl_coef * models.kl_multiplier
        rewards = shaped_rewards(
            logprobs,
            anchor_logprobs,
            mask,
            scores,
            kl_coef=kl_coef,
            score_clip=settings.score_clip,
            penalties=settings.missing_end_penalty * (~completions.ended).float(),
        )

        # Advantages
        values = returns = None
        if models.value is not None:
            values = job.compute_over_processes(compute_outputs, models.value, prompts, completions, "values")
            self.cost.add_scored_tokens(models.value, tokens)
            advantages = generalized_advantages(
                rewards, values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
            )
            returns = advantages + values
            if settings.whiten_advantages:
                advantages = whiten(advantages, mask)
        else:
            group_advantages = rloo_advantages if settings.advantage == "rloo" else grpo_advantages
            advantages = group_advantages(rewards.sum(dim=-1))[..., None] * mask

        metrics = {
            "score": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            "reward": float(rewards.sum(dim=-1).mean()),
            **compute_kl_metrics(logprobs, reference_logprobs, sft_logprobs, mask),
            **mismatch,
            "completion_tokens": float(completions.lengths.float().mean()),
            "end_rate": float(completions.ended.float().mean()),
            "distinct": len({tuple(c) for branches in completions.to_lists() for c in branches}) / mask[..., 0].numel(),
            "tokens": float(mask.sum()),
            "completions": float(mask[..., 0].numel()),
            "kl_coef": kl_coef,
            "sampling_seconds": time.perf_counter() - started,
        }
        if values is not None and returns is not None:
            metrics["value_explained_variance"] = float(explained_variance(values, returns, mask))
        return Rollout(prompts, completions, logprobs, advantages, values, returns, importance_weights), metrics

    def update_on_rollout(self, iteration: int, rollout: Rollout) -> dict[str, float]:
        """Update policy and value model on a rollout, in place; returns the mean metrics of the updates."""
        started = time.perf_counter()
        settings, models = self.settings, self.models
        count = len(rollout.prompts)
        value_only = iteration < settings.value_warmup_steps and settings.advantage == "gae"
        minibatch_size = -(-count // settings.minibatches)
        lengths = count_tokens_per_prompt(rollout.prompts, rollout.completions)
        updates: list[dict[str, float]] = []
        for epoch in range(settings.epochs_per_batch):
            generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + iteration) * 101 + epoch)
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            for first in range(0, count, minibatch_size):
                rows = order[first : first + minibatch_size]
                take_step = partial(
                    self._take_optimizer_step, rollout, rows, self.updates_before[iteration] + len(updates)
                )
                metrics: dict[str, float] = {}
                tokens = sum(lengths[row] for row in rows)
                if models.value is not None and models.value_optimizer is not None:
                    self.cost.add_trained_tokens(models.value, tokens)
                    value_metrics = take_step(
                        models.value, models.value_optimizer, self._compute_value_loss, settings.value_learning_rate
                    )
                    metrics |= {f"value_{name}": value for name, value in value_metrics.items()}
                if not value_only or models.shares_network:
                    count_tokens = self.cost.add_scored_tokens if value_only else self.cost.add_trained_tokens
                    count_tokens(models.policy, tokens)
                    compute_loss = partial(self._compute_policy_loss, value_only=value_only)
                    metrics |= take_step(models.policy, models.policy_optimizer, compute_loss, settings.learning_rate)
                updates.append(metrics)
        names = {name for metrics in updates for name in metrics}
        means = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in sorted(names)}
        return {**means, "updating_seconds": time.perf_counter() - started}

    def adapt_kl_penalty(self, metrics: Mapping[str, float]) -> None:
        """Set the KL coefficient of the next iteration by this one's metrics, if kl_target or kl_budget is set."""
        settings, models = self.settings, self.models
        if settings.kl_target is not None:
            models.kl_coef = adapt_kl_coef(models.kl_coef, metrics["kl"], target_kl=settings.kl_target)
        if settings.kl_budget is not None:
            models.kl_multiplier, models.kl_error_sum = update_kl_budget_controller(
                models.kl_error_sum, metrics["kl_from_sft"], budget=settings.kl_budget
            )

    def _compute_policy_loss(
        self, rollout: Rollout, batch: BranchBatch, prompt_indices: list[int], *, value_only: bool
    ) -> tuple[Tensor, Sums]:
        """Summed policy loss of a microbatch (on a shared network plus the value loss, or that alone), metrics."""
        settings, policy, shares_network = self.settings, self.models.policy, self.models.shares_network
        if shares_network:
            logprobs, entropies, values = policy(batch, "logprobs", "entropies", "values", detach_values=value_only)
        else:
            logprobs, entropies = policy(batch, "logprobs", "entropies")
        mask, number = batch.mask, batch.mask.sum()
        old_logprobs = _select_prompt_values(rollout.logprobs, prompt_indices, mask)
        advantages = _select_prompt_values(rollout.advantages, prompt_indices, mask)
        losses = policy_loss(logprobs, old_logprobs, advantages, clip=settings.clip) * mask
        if rollout.importance_weights is not None:
            losses = losses * _select_prompt_values(rollout.importance_weights, prompt_indices, mask)
        summed = losses.sum()
        with torch.no_grad():
            clipped = clip_fraction(logprobs, old_logprobs, advantages, mask, clip=settings.clip)
            metrics = {
                "policy_loss": (summed.detach(), number),
                "entropy": (entropies.sum(), number),
                "approx_kl": ((kl_k3(old_logprobs, logprobs) * mask).sum(), number),
                "ratio": (((logprobs - old_logprobs).exp() * mask).sum(), number),
                "clip_fraction": (clipped * number, number),
            }
        if shares_network:
            summed_value = self._sum_value_loss(values, rollout, prompt_indices, mask)
            metrics["value_loss"] = (summed_value.detach(), number)
            summed_value = settings.shared_value_coef * summed_value
            summed = summed_value if value_only else summed + summed_value
        return summed, metrics

    def _compute_value_loss(
        self, rollout: Rollout, batch: BranchBatch, prompt_indices: list[int]
    ) -> tuple[Tensor, Sums]:
        """Summed value loss of a microbatch under the separate value model, without metrics."""
        value = self.models.value
        assert value is not None
        return self._sum_value_loss(value(batch, "values"), rollout, prompt_indices, batch.mask), {}

    def _sum_value_loss(
        self, values: Tensor, rollout: Rollout, prompt_indices: list[int], mask: Bool[Tensor, "prompts k tokens"]
    ) -> Tensor:
        """Sum of the clipped value loss over the tokens of a microbatch."""
        assert rollout.values is not None
        assert rollout.returns is not None
        old_values = _select_prompt_values(rollout.values, prompt_indices, mask)
        returns = _select_prompt_values(rollout.returns, prompt_indices, mask)
        return (value_loss(values, old_values, returns, clip=self.settings.value_clip) * mask).sum()

    def _take_optimizer_step(
        self,
        rollout: Rollout,
        prompt_indices: Sequence[int],
        update_number: int,
        lm: LanguageModel,
        optimizer: torch.optim.Optimizer,
        compute_loss: Callable[[Rollout, BranchBatch, list[int]], tuple[Tensor, Sums]],
        peak_rate: float,
    ) -> dict[str, float]:
        """Take one optimizer step on the mean loss a token of some prompts; returns the mean metrics."""
        lm.train()
        return take_optimizer_step(
            optimizer,
            iterate_microbatches(self.job, lm, rollout.prompts, rollout.completions, prompt_indices),
            partial(compute_loss, rollout),
            loss_divisor=int(rollout.completions.mask[list(prompt_indices)].sum()),
            max_grad_norm=self.settings.max_grad_norm,
            learning_rate=compute_learning_rate(
                update_number, total_steps=self.updates_before[-1], settings=self.settings, peak_rate=peak_rate
            ),
            processes=self.job.processes,
        )


def _select_prompt_values(values: Tensor, prompt_indices: list[int], mask: Tensor) -> Tensor:
    """Per-token values of some prompts, cut to the mask's length and moved to its device."""
    return values[prompt_indices][..., : mask.shape[-1]].to(mask.device)
