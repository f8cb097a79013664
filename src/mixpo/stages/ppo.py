"""PPO: reinforcement learning on any prompts, from any start, anchored to any reference. Equation 3 of the paper.

One iteration is read from top to bottom in `PPOTraining.roll_out` and `PPOTraining.learn`: sample, score, shape
rewards, advantages, update. Every tensor with a number a token is [prompts, k, tokens], from the sampler to the loss.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixpo.algorithms.kl import adapt_kl_coef, compute_sft_weight, control_kl_budget, kl_k1, kl_k3
from mixpo.algorithms.masked import masked_mean, whiten
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
from mixpo.data.branches import BranchBatch, pack, row_lengths, split_into_microbatches
from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt
from mixpo.data.tokens import tokenize_prompt
from mixpo.models.adapters import add_lora
from mixpo.models.digests import model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import load_policy
from mixpo.models.sampling import SampledCompletions
from mixpo.models.saving import save_model
from mixpo.models.scoring import compute_output, compute_scores, compute_token_logprobs, retokenize
from mixpo.stages.ppo_models import ActorCritic, FrozenModels, load_frozen_models, make_actor_critic
from mixpo.stages.ppo_settings import PPOSettings, suggest_against_alarms, suggest_against_divergence
from mixpo.stages.rows import read_table, select_unique_prompts
from mixpo.stages.stage import Part, PolicyStage, RewardStage, Snapshot, model_folder, write_summary
from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.health import emit_alarms, mean_of_last_steps, policy_alarms
from mixpo.training.parallel import Processes
from mixpo.training.record import Cost, Metrics, append_jsonl, trim_jsonl
from mixpo.training.runtime import Runtime
from mixpo.training.step import Diverged, Sums, scheduled_learning_rate, take_optimizer_step

Loss = Callable[[tuple[BranchBatch, list[int]]], tuple[Tensor, Sums]]
STEP_0_KL = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |log pi - log pi_ref| in nats a token allowed at step 0 when the policy starts as its own reference."""


class PPO(PolicyStage, PPOSettings):
    """Maximises the score minus kl_coef times the KL to the reference, on completions of the current policy."""

    policy: PolicyStage
    reference: PolicyStage
    sft: PolicyStage
    """The KL from it is logged, and held to kl_budget."""
    reward: RewardStage
    prompts: Part
    snapshots: int = pydantic.Field(0, ge=0)
    """Policies kept on the way, at even distances, to see how they came where they are."""

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write `model/` and `completions.jsonl`, one completion of each iteration to read."""
        processes, cost = runtime.start(), Cost()
        torch.manual_seed(self.seed)
        policy_folder, reference_folder = model_folder(inputs["policy"]), model_folder(inputs["reference"])
        policy = load_policy(policy_folder, device=processes.device, precision=self.precision)
        frozen = load_frozen_models(self, inputs, policy)
        starts_at_reference = model_digest(policy_folder) == model_digest(reference_folder)
        if self.lora:
            add_lora(policy, self.lora)
        models = make_actor_critic(self, inputs, policy, frozen.reward)
        prompts = select_unique_prompts(read_table(inputs["prompts"]))
        training = PPOTraining(self, models, frozen, prompts, runtime, processes, cost)
        total = training.total_steps
        snapshot_steps = _snapshot_steps(self.snapshots, total)

        parts = models.stateful_parts()
        checkpoint = Checkpoint(out, parts, every_minutes=runtime.checkpoint_minutes, processes=processes)
        first_step, extra = checkpoint.resume()
        if extra:
            cost.resume(extra["cost"])
            models.kl_coef, models.kl_multiplier, models.kl_error_sum = extra["kl"]
        trim_jsonl(out / "completions.jsonl", first_step)
        log = Metrics(out, resumed_at=first_step, processes=processes)
        weights = TrainableWeights(policy)
        last_good_weights = weights.copy()

        for step in range(first_step, total):
            rows = training.select_prompts(step)
            try:
                rollout, metrics = training.roll_out(step, rows)
                _check_kl(self, metrics, step=step, starts_at_reference=starts_at_reference)
                weights.copy_to(last_good_weights)
                metrics |= training.learn(step, rollout)
            except Diverged as error:
                stopped = out / "stopped"
                weights.load_state_dict(last_good_weights)
                save_model(policy, stopped)
                raise Diverged(
                    f"step {step + 1} of {total}: {error}; try "
                    f"{suggest_against_divergence(self, training.updates_before, step)}; the last policy before that "
                    f"is in {stopped}"
                ) from error
            training.control_kl(metrics)
            metrics["seconds"] = metrics["sampling_seconds"] + metrics["updating_seconds"]
            text = policy.read_text(rollout.completions.to_lists()[0][0])
            append_jsonl(out / "completions.jsonl", [{"step": step, "prompt": prompts[rows[0]], "completion": text}])
            log.add(step, total, metrics)
            if step + 1 in snapshot_steps:
                snapshot = Snapshot(stage=self, number=snapshot_steps.index(step + 1) + 1)
                save_model(policy, model_folder(snapshot.path_in(out)))
            kl_state = [models.kl_coef, models.kl_multiplier, models.kl_error_sum]
            checkpoint.maybe_write(step + 1, {"cost": cost.counts(), "kl": kl_state})

        digest, metrics_rows = save_model(policy, model_folder(out)), log.rows()
        names = ("score", "reward", "kl", "kl_from_sft", "entropy", "end_rate", "completion_tokens")
        write_summary(
            out,
            cost,
            model=digest,
            prompts=len(prompts),
            steps=total,
            snapshots=snapshot_steps,
            alarms=emit_alarms(policy_alarms(metrics_rows, suggest_against_alarms(self))),
            **{name: mean_of_last_steps(metrics_rows, name) for name in names},
        )
        checkpoint.remove()


@dataclass(frozen=True)
class Rollout:
    """One iteration's completions, ready to learn from."""

    prompts: list[list[int]]
    completions: SampledCompletions
    advantages: Float[Tensor, "prompts k tokens"]
    values: Float[Tensor, "prompts k tokens"] | None
    returns: Float[Tensor, "prompts k tokens"] | None


class PPOTraining:
    """What the iterations of PPO share: models, prompts, schedule and cost."""

    def __init__(
        self,
        settings: PPOSettings,
        models: ActorCritic,
        frozen: FrozenModels,
        prompts: Sequence[Prompt],
        runtime: Runtime,
        processes: Processes,
        cost: Cost,
    ) -> None:
        self.settings, self.models, self.frozen = settings, models, frozen
        self.prompts = prompts
        self.prompt_tokens = [tokenize_prompt(models.policy.tokenizer, prompt) for prompt in prompts]
        self.sampler, self.processes, self.cost = runtime.make_sampler(), processes, cost
        self.microbatch_tokens = runtime.microbatch_tokens
        self.steps_per_epoch = -(-len(prompts) // settings.batch_size)
        self.total_steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.updates_before = count_updates(settings, len(prompts), self.total_steps)

    def select_prompts(self, step: int) -> list[int]:
        """Select the prompts of an iteration: a new order every epoch, fixed by the seed."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.prompts), generator=generator)
        rows: list[int] = order[place * self.settings.batch_size : (place + 1) * self.settings.batch_size].tolist()
        return rows

    @torch.no_grad()
    def roll_out(self, step: int, rows: Sequence[int]) -> tuple[Rollout, dict[str, float]]:
        """Sample completions, score them, shape rewards and compute advantages; the rollout and its metrics."""
        started = time.perf_counter()
        settings, models, frozen, budget = self.settings, self.models, self.frozen, self.microbatch_tokens
        policy, prompts = models.policy, [self.prompt_tokens[row] for row in rows]

        # Sample
        self.sampler.load_policy(policy)
        completions = self.sampler.draw(
            prompts,
            k=settings.completions_per_prompt,
            max_tokens=settings.max_completion_tokens,
            seed=-1 - settings.seed * 1_000_003 - step,  # of its own: other stages sample from the seeds above 0
        )
        mask, logprobs = completions.mask, completions.logprobs
        tokens = sum(map(len, prompts)) + int(mask.sum())
        self.cost.sampled(policy.model, int(mask.sum()), sum(map(len, prompts)))

        # Score
        texts = [self.prompts[row] for row in rows]
        reward_inputs = retokenize(frozen.reward, policy, texts, prompts, completions)
        found_scores = compute_scores(frozen.reward, *reward_inputs, token_budget=budget)
        self.cost.scored(frozen.reward.model, tokens)
        reference_logprobs = compute_token_logprobs(frozen.reference, prompts, completions, token_budget=budget)
        self.cost.scored(frozen.reference.model, tokens)
        if frozen.sft is frozen.reference:
            sft_logprobs = reference_logprobs
        else:
            sft_logprobs = compute_token_logprobs(frozen.sft, prompts, completions, token_budget=budget)
            if settings.kl_budget is not None:  # else it is a metric alone, and costs no method anything
                self.cost.scored(frozen.sft.model, tokens)

        # Shape rewards
        anchor_logprobs = reference_logprobs.lerp(sft_logprobs, compute_sft_weight(models.kl_multiplier))
        kl_coef = models.kl_coef * models.kl_multiplier
        rewards = shaped_rewards(
            logprobs,
            anchor_logprobs,
            mask,
            found_scores,
            kl_coef=kl_coef,
            score_clip=settings.score_clip,
            penalties=settings.missing_end_penalty * (~completions.ended).float(),
        )

        # Advantages
        values = returns = None
        if models.value is not None:
            values = compute_output(models.value, prompts, completions, "values", token_budget=budget)
            self.cost.scored(models.value.model, tokens)
            advantages = generalized_advantages(
                rewards, values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
            )
            returns = advantages + values
            if settings.whiten_advantages:
                advantages = whiten(advantages, mask)
        else:
            compare = rloo_advantages if settings.advantage == "rloo" else grpo_advantages
            advantages = compare(rewards.sum(dim=-1))[..., None] * mask

        metrics = {
            "score": float(found_scores.mean()),
            "score_std": float(found_scores.std(correction=0)),
            "reward": float(rewards.sum(dim=-1).mean()),
            **_kl_metrics(logprobs, reference_logprobs, sft_logprobs, mask),
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

    def learn(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Update policy and value on a rollout; the mean of the updates' metrics."""
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

    def control_kl(self, metrics: Mapping[str, float]) -> None:
        """Let the controllers of kl_target and kl_budget change the coefficient for the next iteration."""
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
        """Take one optimizer step of the policy: with a shared model of both losses, or of the value loss alone."""
        settings, policy, shares_model = self.settings, self.models.policy, self.models.shares_model

        def loss(microbatch: tuple[BranchBatch, list[int]]) -> tuple[Tensor, Sums]:
            batch, chosen = microbatch
            (self.cost.scored if value_only else self.cost.trained)(policy.model, batch.tokens)
            if shares_model:
                logprobs, entropies, values = policy(batch, "logprobs", "entropies", "values", detach_values=value_only)
            else:
                logprobs, entropies = policy(batch, "logprobs", "entropies")
            mask, number = batch.mask, batch.mask.sum()
            old_logprobs = _select(rollout.completions.logprobs, chosen, mask)
            advantages = _select(rollout.advantages, chosen, mask)
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
                summed_value = self._value_loss(values, rollout, chosen, mask)
                metrics["value_loss"] = (summed_value.detach(), number)
                summed_value = settings.shared_value_coef * summed_value
                summed = summed_value if value_only else summed + summed_value
            return summed, metrics

        return self._update(policy, self.models.policy_optimizer, rollout, rows, loss, number, settings.learning_rate)

    def _update_value(self, rollout: Rollout, rows: Sequence[int], number: int) -> dict[str, float]:
        """Take one optimizer step of a value model of its own."""
        value, optimizer = self.models.value, self.models.value_optimizer
        assert value is not None
        assert optimizer is not None

        def loss(microbatch: tuple[BranchBatch, list[int]]) -> tuple[Tensor, Sums]:
            batch, chosen = microbatch
            self.cost.trained(value.model, batch.tokens)
            return self._value_loss(value(batch, "values"), rollout, chosen, batch.mask), {}

        return self._update(value, optimizer, rollout, rows, loss, number, self.settings.value_learning_rate)

    def _value_loss(
        self, values: Tensor, rollout: Rollout, chosen: list[int], mask: Bool[Tensor, "prompts k tokens"]
    ) -> Tensor:
        assert rollout.values is not None
        assert rollout.returns is not None
        old_values, returns = (_select(x, chosen, mask) for x in (rollout.values, rollout.returns))
        return (value_loss(values, old_values, returns, clip=self.settings.value_clip) * mask).sum()

    def _update(
        self,
        lm: LanguageModel,
        optimizer: torch.optim.Optimizer,
        rollout: Rollout,
        rows: Sequence[int],
        loss: Loss,
        number: int,
        peak: float,
    ) -> dict[str, float]:
        lm.train()
        return take_optimizer_step(
            optimizer,
            self._microbatches(lm, rollout, self.processes.share(rows)),
            loss,
            count=int(rollout.completions.mask[list(rows)].sum()),
            max_grad_norm=self.settings.max_grad_norm,
            rate=scheduled_learning_rate(number, total=self.updates_before[-1], settings=self.settings, peak=peak),
            processes=self.processes,
        )

    def _microbatches(
        self, lm: LanguageModel, rollout: Rollout, rows: Sequence[int]
    ) -> Iterator[tuple[BranchBatch, list[int]]]:
        lengths = row_lengths(rollout.prompts, rollout.completions)
        for part in split_into_microbatches([lengths[row] for row in rows], self.microbatch_tokens):
            chosen = [rows[place] for place in part]
            batch = pack(rollout.prompts, rollout.completions, chosen, share_prompt=lm.shares_prompts)
            yield batch.to(lm.device), chosen


def count_updates(settings: PPOSettings, prompts: int, iterations: int) -> list[int]:
    """Count the optimizer steps before each iteration, and at the end those of all: the learning rate follows them.

    The last iteration of a pass over the prompts has fewer of them, and with that perhaps fewer minibatches.
    """
    per_epoch = -(-prompts // settings.batch_size)
    counts = [min(settings.batch_size, prompts - step % per_epoch * settings.batch_size) for step in range(iterations)]
    minibatches = [-(-count // -(-count // settings.minibatches)) for count in counts]
    return list(accumulate((settings.epochs_per_batch * number for number in minibatches), initial=0))


def _snapshot_steps(count: int, total: int) -> list[int]:
    """After which steps a snapshot is kept: the ends of the first `count` of count + 1 equal parts."""
    if count >= total:
        raise InputError(
            f"trace.snapshots: found {count} for {total} iterations of PPO; expected fewer; lower it or "
            "ppo.batch_size, or raise ppo.epochs"
        )
    return [round(total * number / (count + 1)) for number in range(1, count + 1)]


def _kl_metrics(
    logprobs: Float[Tensor, "prompts k tokens"],
    reference_logprobs: Float[Tensor, "prompts k tokens"],
    sft_logprobs: Float[Tensor, "prompts k tokens"],
    mask: Bool[Tensor, "prompts k tokens"],
) -> dict[str, float]:
    kl = kl_k1(logprobs, reference_logprobs) * mask
    return {
        "kl": float(kl.sum(dim=-1).mean()),
        "kl_per_token": float(masked_mean(kl, mask)),
        "kl_k3": float((kl_k3(logprobs, reference_logprobs) * mask).sum(dim=-1).mean()),
        "kl_abs_per_token": float(masked_mean(kl.abs(), mask)),
        "kl_from_sft": float((kl_k1(logprobs, sft_logprobs) * mask).sum(dim=-1).mean()),
    }


def _check_kl(settings: PPOSettings, metrics: Mapping[str, float], *, step: int, starts_at_reference: bool) -> None:
    """Stop on a KL that runs away; and on one that is not 0 at step 0 when the policy starts as its reference."""
    if step == 0 and starts_at_reference and metrics["kl_abs_per_token"] > STEP_0_KL[settings.precision]:
        raise RuntimeError(
            f"the policy starts as its own reference, yet their log-probs differ by {metrics['kl_abs_per_token']:.3g} "
            f"nats a token at step 1; expected at most {STEP_0_KL[settings.precision]}: the reference is not what it "
            "says"
        )
    if not math.isfinite(metrics["kl_per_token"]) or metrics["kl_per_token"] > settings.max_kl:
        if step == 0:
            raise InputError(
                f"ppo.max_kl: the policy starts {metrics['kl_per_token']:.3g} nats a token from its reference; "
                f"expected at most {settings.max_kl:g}; raise it, or name a reference that is nearer"
            )
        raise Diverged(
            f"the KL to the reference ran away: {metrics['kl_per_token']:.3g} nats a token, more than "
            f"max_kl = {settings.max_kl:g}"
        )


def _select(values: Tensor, rows: list[int], mask: Tensor) -> Tensor:
    """The values of some prompts, as wide as their mask and on its device."""
    return values[rows][..., : mask.shape[-1]].to(mask.device)
