"""PPO on any prompts, from any policy, with a KL penalty to any reference. Equation 3 of the paper.

An iteration is `PPOTraining.roll_out` (sample, score, shape rewards, compute advantages) and then
`PPOTraining.train_on` (update policy and value). Every tensor of per-token numbers is [prompts, k, tokens].
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixpo.algorithms.kl import adapt_kl_coef, compute_sft_weight, control_kl_budget, kl_k3
from mixpo.algorithms.masked import whiten
from mixpo.algorithms.ppo import (
    clip_fraction,
    explained_variance,
    generalized_advantages,
    grpo_advantages,
    policy_loss,
    rloo_advantages,
    shaped_rewards,
    value_loss,
)
from mixpo.data.branches import BranchBatch, pack_branches, row_lengths, split_into_microbatches
from mixpo.data.rows import Prompt
from mixpo.models.adapters import add_lora
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import SampledCompletions
from mixpo.models.saving import save_model
from mixpo.models.scoring import compute_in_batches, compute_scores, compute_token_logprobs, retokenize
from mixpo.stages.ppo_kl import check_kl_limits, compute_kl_metrics
from mixpo.stages.ppo_models import ActorCritic, FrozenModels, load_frozen_models, make_actor_critic
from mixpo.stages.ppo_settings import (
    PPOSettings,
    choose_snapshot_steps,
    count_updates,
    suggest_against_alarms,
    suggest_ppo_remedies,
)
from mixpo.stages.rows import read_unique_prompts
from mixpo.stages.stage import Part, PolicyStage, RewardStage, Snapshot
from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.health import compute_mean_of_last_steps, emit_alarms, find_policy_alarms
from mixpo.training.job import Job, model_folder
from mixpo.training.record import MetricsLog, append_jsonl, delete_lines_from_step
from mixpo.training.step import Diverged, Sums, compute_learning_rate, take_optimizer_step

Loss = Callable[[tuple[BranchBatch, list[int]]], tuple[Tensor, Sums]]


class PPO(PolicyStage, PPOSettings):
    """A policy trained to maximise the score minus kl_coef times the KL to the reference (equation 3)."""

    policy: PolicyStage
    reference: PolicyStage
    sft: PolicyStage
    """The KL from it is a metric, and controlled if kl_budget is set."""
    reward: RewardStage
    prompts: Part
    snapshots: int = pydantic.Field(0, ge=0)
    """Number of policies saved during training, at equal distances."""

    def compute(self, inputs: Mapping[str, Path], job: Job) -> None:
        """Train, and write `model/` and `completions.jsonl`, which has one completion of each iteration."""
        torch.manual_seed(self.seed)
        policy = job.load_policy(inputs["policy"], self.precision)
        frozen = load_frozen_models(self, inputs, policy, job)
        digests = [compute_model_digest(model_folder(inputs[name])) for name in ("policy", "reference")]
        if self.lora:
            add_lora(policy, self.lora)
        models = make_actor_critic(self, inputs, policy, frozen.reward, job)
        prompts, prompt_tokens = read_unique_prompts(inputs["prompts"], policy.tokenizer)
        training = PPOTraining(job, self, models, frozen, prompts, prompt_tokens)
        total = training.total_steps
        snapshot_steps = choose_snapshot_steps(self.snapshots, total)

        checkpoint = Checkpoint(job, models.stateful_parts())
        first_step, extra = checkpoint.resume()
        if extra:
            job.cost.restore(extra["cost"])
            models.kl_coef, models.kl_multiplier, models.kl_error_sum = extra["kl"]
        delete_lines_from_step(job.out / "completions.jsonl", first_step)
        log = MetricsLog(job.out, resumed_at=first_step, processes=job.processes)
        weights = TrainableWeights(policy)
        last_good_weights = weights.copy_to_cpu()

        for step in range(first_step, total):
            rows = training.select_prompt_rows(step)
            try:
                rollout, metrics = training.roll_out(step, rows)
                check_kl_limits(self, metrics, step=step, starts_at_reference=digests[0] == digests[1])
                weights.update_copy(last_good_weights)
                metrics |= training.train_on(step, rollout)
            except Diverged as error:
                stopped = job.out / "stopped"
                weights.load_state_dict(last_good_weights)
                save_model(policy, stopped)
                raise Diverged(
                    f"step {step + 1} of {total}: {error}; try "
                    f"{suggest_ppo_remedies(self, training.updates_before, step)}; the last policy before that "
                    f"is in {stopped}"
                ) from error
            training.adapt_kl_penalty(metrics)
            metrics["seconds"] = metrics["sampling_seconds"] + metrics["updating_seconds"]
            text = policy.decode_completion(rollout.completions.to_lists()[0][0])
            row = {"step": step, "prompt": prompts[rows[0]], "completion": text}
            append_jsonl(job.out / "completions.jsonl", [row])
            log.add(step, total, metrics)
            if step + 1 in snapshot_steps:
                snapshot = Snapshot(stage=self, number=snapshot_steps.index(step + 1) + 1)
                save_model(policy, model_folder(snapshot.path_in(job.out)))
            kl_state = [models.kl_coef, models.kl_multiplier, models.kl_error_sum]
            checkpoint.write_if_due(step + 1, {"cost": job.cost.counts(), "kl": kl_state})

        digest, metrics_rows = job.save_model(policy), log.rows()
        names = ("score", "reward", "kl", "kl_from_sft", "entropy", "end_rate", "completion_tokens")
        job.finish(
            model=digest,
            prompts=len(prompts),
            steps=total,
            snapshots=snapshot_steps,
            alarms=emit_alarms(find_policy_alarms(metrics_rows, suggest_against_alarms(self))),
            **{name: compute_mean_of_last_steps(metrics_rows, name) for name in names},
        )


@dataclass(frozen=True)
class Rollout:
    """Completions of one iteration, with advantages, values and returns."""

    prompts: list[list[int]]
    completions: SampledCompletions
    advantages: Float[Tensor, "prompts k tokens"]
    values: Float[Tensor, "prompts k tokens"] | None
    returns: Float[Tensor, "prompts k tokens"] | None


class PPOTraining:
    """Models, prompts, schedule and cost of PPO, and the two halves of its iteration: `roll_out` and `train_on`."""

    def __init__(
        self,
        job: Job,
        settings: PPOSettings,
        models: ActorCritic,
        frozen: FrozenModels,
        prompts: Sequence[Prompt],
        prompt_tokens: Sequence[list[int]],
    ) -> None:
        self.job, self.settings, self.models, self.frozen = job, settings, models, frozen
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.sampler, self.cost = job.runtime.make_sampler(), job.cost
        self.steps_per_epoch = -(-len(prompts) // settings.batch_size)
        self.total_steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.updates_before = count_updates(settings, len(prompts), self.total_steps)

    def select_prompt_rows(self, step: int) -> list[int]:
        """Select the prompts of an iteration; each epoch has its own order, a function of the seed and the epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.prompts), generator=generator)
        rows: list[int] = order[place * self.settings.batch_size : (place + 1) * self.settings.batch_size].tolist()
        return rows

    @torch.no_grad()
    def roll_out(self, step: int, rows: Sequence[int]) -> tuple[Rollout, dict[str, float]]:
        """Sample completions, score them, shape rewards and compute advantages; returns the rollout and metrics."""
        started = time.perf_counter()
        settings, models, frozen, budget = self.settings, self.models, self.frozen, self.job.runtime.microbatch_tokens
        policy, prompts = models.policy, [self.prompt_tokens[row] for row in rows]

        # Sample
        self.sampler.load_policy(policy)
        completions = self.sampler.draw(
            prompts,
            k=settings.completions_per_prompt,
            max_tokens=settings.max_completion_tokens,
            seed=-1 - settings.seed * 1_000_003 - step,  # below 0: seeds from 0 on are those of other stages
        )
        mask, logprobs = completions.mask, completions.logprobs
        tokens = sum(map(len, prompts)) + int(mask.sum())
        self.cost.count_sampled(policy.model, int(mask.sum()), sum(map(len, prompts)))

        # Score
        rows_text = [self.prompts[row] for row in rows]
        reward_inputs = retokenize(frozen.reward, policy, rows_text, prompts, completions)
        scores = compute_scores(frozen.reward, *reward_inputs, token_budget=budget)
        self.cost.count_scored(frozen.reward.model, tokens)
        reference_logprobs = compute_token_logprobs(frozen.reference, prompts, completions, token_budget=budget)
        self.cost.count_scored(frozen.reference.model, tokens)
        if frozen.sft is frozen.reference:
            sft_logprobs = reference_logprobs
        else:
            sft_logprobs = compute_token_logprobs(frozen.sft, prompts, completions, token_budget=budget)
            if settings.kl_budget is not None:  # otherwise only a metric, which is not a cost of the method
                self.cost.count_scored(frozen.sft.model, tokens)

        # Shape rewards
        anchor_logprobs = reference_logprobs.lerp(sft_logprobs, compute_sft_weight(models.kl_multiplier))
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
            values = compute_in_batches(models.value, prompts, completions, "values", token_budget=budget)
            self.cost.count_scored(models.value.model, tokens)
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
        return Rollout(prompts, completions, advantages, values, returns), metrics

    def train_on(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Update policy and value on a rollout; returns the mean metrics of the updates."""
        started = time.perf_counter()
        settings, models = self.settings, self.models
        count = len(rollout.prompts)
        value_only = step < settings.value_warmup_steps and settings.advantage == "gae"
        minibatch_size = -(-count // settings.minibatches)
        updates: list[dict[str, float]] = []
        for epoch in range(settings.epochs_per_batch):
            generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) * 101 + epoch)
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            for first in range(0, count, minibatch_size):
                rows = order[first : first + minibatch_size]
                number = self.updates_before[step] + len(updates)
                metrics: dict[str, float] = {}
                if models.value_optimizer is not None:
                    value_metrics = self._update_value(rollout, rows, number)
                    metrics |= {f"value_{name}": value for name, value in value_metrics.items()}
                if not value_only or models.shares_model:
                    metrics |= self._update_policy(rollout, rows, number, value_only=value_only)
                updates.append(metrics)
        names = {name for metrics in updates for name in metrics}
        means = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in sorted(names)}
        return {**means, "updating_seconds": time.perf_counter() - started}

    def adapt_kl_penalty(self, metrics: Mapping[str, float]) -> None:
        """Adapt the KL coefficient of the next iteration, as kl_target or kl_budget demand."""
        settings, models = self.settings, self.models
        if settings.kl_target is not None:
            models.kl_coef = adapt_kl_coef(models.kl_coef, metrics["kl"], target=settings.kl_target)
        if settings.kl_budget is not None:
            models.kl_multiplier, models.kl_error_sum = control_kl_budget(
                models.kl_error_sum, metrics["kl_from_sft"], budget=settings.kl_budget
            )

    def _update_policy(
        self, rollout: Rollout, rows: Sequence[int], number: int, *, value_only: bool
    ) -> dict[str, float]:
        """Take one optimizer step on the policy loss; on a shared model plus the value loss, or that alone."""
        settings, policy, shares_model = self.settings, self.models.policy, self.models.shares_model

        def compute_loss(microbatch: tuple[BranchBatch, list[int]]) -> tuple[Tensor, Sums]:
            batch, selected = microbatch
            (self.cost.count_scored if value_only else self.cost.count_trained)(policy.model, batch.token_count)
            if shares_model:
                logprobs, entropies, values = policy(batch, "logprobs", "entropies", "values", detach_values=value_only)
            else:
                logprobs, entropies = policy(batch, "logprobs", "entropies")
            mask, number = batch.mask, batch.mask.sum()
            old_logprobs = _select_rows(rollout.completions.logprobs, selected, mask)
            advantages = _select_rows(rollout.advantages, selected, mask)
            summed = (policy_loss(logprobs, old_logprobs, advantages, clip=settings.clip) * mask).sum()
            with torch.no_grad():
                clipped = clip_fraction(logprobs, old_logprobs, advantages, mask, clip=settings.clip)
                metrics = {
                    "policy_loss": (summed.detach(), number),
                    "entropy": (entropies.sum(), number),
                    "approx_kl": ((kl_k3(old_logprobs, logprobs) * mask).sum(), number),
                    "ratio": (((logprobs - old_logprobs).exp() * mask).sum(), number),
                    "clip_fraction": (clipped * number, number),
                }
            if shares_model:
                summed_value = self._sum_value_loss(values, rollout, selected, mask)
                metrics["value_loss"] = (summed_value.detach(), number)
                summed_value = settings.shared_value_coef * summed_value
                summed = summed_value if value_only else summed + summed_value
            return summed, metrics

        return self._take_optimizer_step(
            policy, self.models.policy_optimizer, rollout, rows, compute_loss, number, settings.learning_rate
        )

    def _update_value(self, rollout: Rollout, rows: Sequence[int], number: int) -> dict[str, float]:
        """Take one optimizer step of the separate value model."""
        value, optimizer = self.models.value, self.models.value_optimizer
        assert value is not None
        assert optimizer is not None

        def compute_loss(microbatch: tuple[BranchBatch, list[int]]) -> tuple[Tensor, Sums]:
            batch, selected = microbatch
            self.cost.count_trained(value.model, batch.token_count)
            return self._sum_value_loss(value(batch, "values"), rollout, selected, batch.mask), {}

        return self._take_optimizer_step(
            value, optimizer, rollout, rows, compute_loss, number, self.settings.value_learning_rate
        )

    def _sum_value_loss(
        self, values: Tensor, rollout: Rollout, selected: list[int], mask: Bool[Tensor, "prompts k tokens"]
    ) -> Tensor:
        """Sum the clipped value loss over the tokens of a microbatch."""
        assert rollout.values is not None
        assert rollout.returns is not None
        old_values, returns = (_select_rows(x, selected, mask) for x in (rollout.values, rollout.returns))
        return (value_loss(values, old_values, returns, clip=self.settings.value_clip) * mask).sum()

    def _take_optimizer_step(
        self,
        lm: LanguageModel,
        optimizer: torch.optim.Optimizer,
        rollout: Rollout,
        rows: Sequence[int],
        loss: Loss,
        number: int,
        peak: float,
    ) -> dict[str, float]:
        """Take one optimizer step on the mean `loss` a token of some rows; `peak` is the peak learning rate."""
        lm.train()
        return take_optimizer_step(
            optimizer,
            self._iterate_microbatches(lm, rollout, self.job.processes.select_own_rows(rows)),
            loss,
            divisor=int(rollout.completions.mask[list(rows)].sum()),
            max_grad_norm=self.settings.max_grad_norm,
            rate=compute_learning_rate(number, total=self.updates_before[-1], settings=self.settings, peak=peak),
            processes=self.job.processes,
        )

    def _iterate_microbatches(
        self, lm: LanguageModel, rollout: Rollout, rows: Sequence[int]
    ) -> Iterator[tuple[BranchBatch, list[int]]]:
        """Yield the microbatches of some rows, each with its row indices."""
        lengths = row_lengths(rollout.prompts, rollout.completions)
        for part in split_into_microbatches([lengths[row] for row in rows], self.job.runtime.microbatch_tokens):
            selected = [rows[index] for index in part]
            batch = pack_branches(rollout.prompts, rollout.completions, selected, share_prompt=lm.shares_prompts)
            yield batch.to(lm.device), selected


def _select_rows(values: Tensor, rows: list[int], mask: Tensor) -> Tensor:
    """Select the per-token values of some prompts, cut to the mask's length and on its device."""
    return values[rows][..., : mask.shape[-1]].to(mask.device)
