"""PPO: reinforcement learning on any prompts, from any start, anchored to any reference. Equation 3 of the paper.

One iteration is read from top to bottom in `_roll_out` and `_learn`: sample, score, shape rewards, advantages, update.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixpo.algorithms.kl import adapt_kl_coef, kl_k1, kl_k3, sft_weight, steer
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
from mixpo.data.branches import by_tokens, pack, row_lengths
from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt
from mixpo.data.tokens import prompt_tokens
from mixpo.models.language_model import LanguageModel, Output
from mixpo.models.loading import (
    Lora,
    add_lora,
    freeze,
    load_policy,
    load_reward_model,
    model_digest,
    new_reward_model,
    same_tokens,
    save_model,
)
from mixpo.models.sampling import sample
from mixpo.models.scoring import read_all, retokenised, scores, token_logprobs
from mixpo.stages.rows import read_table, unique_prompts
from mixpo.stages.stage import Part, Seeded, Snapshot, Stage, finish, model_in
from mixpo.training.checkpoint import Checkpoint, Stateful, Trainable
from mixpo.training.health import mean_of_last, policy_alarms, tell
from mixpo.training.record import Cost, Metrics, append_jsonl, trim_jsonl
from mixpo.training.runtime import Runtime
from mixpo.training.step import Diverged, OptimizerSettings, Sums, learning_rate, make_optimizer, remedies, update

DEEPSPEED_CHAT: dict[str, Any] = {
    "kl_coef": 0.1,
    "score_clip": 5.0,
    "clip": 0.2,
    "value_clip": 0.2,
    "discount": 1.0,
    "gae_lambda": 0.95,
    "whiten_advantages": False,
    "epochs_per_batch": 1,
    "minibatches": 1,
    "adam_betas": (0.9, 0.95),
    "decay": "cosine",
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "value_init": "reward",
}
"""The constants on which the paper ran (dschat/rlhf/ppo_trainer.py). Sampling stays at temperature 1 and the score on
the last real token: DeepSpeed-Chat samples Llama greedily and scores one step past it where there is padding."""

OF_GAE = (
    "discount",
    "gae_lambda",
    "whiten_advantages",
    "value_learning_rate",
    "value_clip",
    "value_init",
    "shared_value_coef",
    "value_warmup_steps",
)
"""Settings that do nothing with another advantage."""

STEP_0_KL = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |log pi - log pi_ref| in nats a token allowed at step 0 when the policy starts as its own reference."""


class PPOSettings(Seeded, OptimizerSettings):
    """Proximal policy optimization of completions (Schulman et al. 2017; Ziegler et al. 2019)."""

    preset: Literal["mixpo", "deepspeed-chat"] = "mixpo"
    """`deepspeed-chat` sets the constants that the paper's software has; keys given beside it win."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """`gae` uses a value model; the others compare `completions_per_prompt` completions and use none."""
    completions_per_prompt: int = pydantic.Field(1, ge=1)
    epochs: float = pydantic.Field(1.0, gt=0)
    """Passes over the prompts; the last may be a part of one."""
    batch_size: int = pydantic.Field(64, ge=1)
    """Prompts of an iteration."""
    minibatches: int = pydantic.Field(1, ge=1)
    """Optimizer steps of one pass over an iteration's completions."""
    epochs_per_batch: int = pydantic.Field(1, ge=1)
    """Passes over an iteration's completions."""
    learning_rate: float = pydantic.Field(3e-6, gt=0)
    value_learning_rate: float = pydantic.Field(5e-6, gt=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    warmup_steps: int = pydantic.Field(100, ge=0)
    kl_coef: float = pydantic.Field(0.1, ge=0)
    """The paper's beta: reward units a nat of KL to the reference."""
    kl_target: float | None = pydantic.Field(None, gt=0)
    """Nats a completion that an adaptive controller steers the KL to by changing kl_coef (Ziegler et al. 2019)."""
    kl_budget: float | None = pydantic.Field(None, gt=0)
    """Nats a completion to which a controller holds the KL from SFT, whatever the reference is, by a multiplier of
    kl_coef: under 1 it loosens the anchor, above 1 it moves the anchor from the reference to SFT."""
    score_clip: float | None = pydantic.Field(5.0, gt=0)
    missing_end_penalty: float = pydantic.Field(0.0, ge=0)
    """Taken off the clipped score of a completion that was cut off."""
    discount: float = pydantic.Field(1.0, gt=0, le=1)
    gae_lambda: float = pydantic.Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    clip: float = pydantic.Field(0.2, gt=0)
    value_clip: float | None = pydantic.Field(0.2, gt=0)
    value_init: Literal["reward", "policy", "shared"] = "reward"
    """The value model starts from the reward model, head included; from the policy with a new head; or is a head on
    the policy itself, whose loss is added with weight `shared_value_coef`."""
    shared_value_coef: float = pydantic.Field(0.1, gt=0)
    value_warmup_steps: int = pydantic.Field(0, ge=0)
    """First iterations, of `epochs_per_batch` x `minibatches` optimizer steps each, in which only the value model
    learns."""
    max_kl: float = pydantic.Field(1.0, gt=0)
    """Mean KL to the reference, in nats a token, above which the stage stops."""
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    lora: Lora | None = None
    """Adapts the policy and, with a model of its own, the value model, whose head trains whole."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, values: Any, validate: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict) or values.get("preset") != "deepspeed-chat":
            return validate(values)
        settings = validate({**DEEPSPEED_CHAT, **values})
        settings.model_fields_set.intersection_update(values)  # another preset takes the constants along
        return settings

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "PPOSettings":
        if self.kl_budget is not None and (self.kl_target is not None or self.kl_coef == 0):
            raise InputError(
                f"ppo.kl_budget: found beside kl_target {self.kl_target} and kl_coef {self.kl_coef:g}; expected no "
                "kl_target and a kl_coef above 0, which the budget's controller multiplies"
            )
        if self.advantage != "gae" and self.completions_per_prompt < 2:
            raise InputError(
                f"ppo.completions_per_prompt: found {self.completions_per_prompt} with advantage: {self.advantage}; "
                "expected at least 2 completions to compare; 4 is usual"
            )
        return self


@dataclass(frozen=True)
class Judges:
    """The frozen models that look at completions."""

    reference: LanguageModel
    sft: LanguageModel
    """The reference itself where that is SFT."""
    reward: LanguageModel


@dataclass(frozen=True)
class Drawn:
    """Completions of the current policy. Tensors are [prompts, k, tokens] on the CPU."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    mask: Bool[Tensor, "prompts k tokens"]
    logprobs: Float[Tensor, "prompts k tokens"]
    """Kept from sampling."""
    ended: Bool[Tensor, "prompts k"]

    @property
    def tokens(self) -> int:
        """Prompts once, completions all."""
        return sum(map(len, self.prompts)) + int(self.mask.sum())


@dataclass(frozen=True)
class Judged:
    """What the frozen models say of them."""

    scores: Float[Tensor, "prompts k"]
    reference_logprobs: Float[Tensor, "prompts k tokens"]
    sft_logprobs: Float[Tensor, "prompts k tokens"]


@dataclass(frozen=True)
class Rollout:
    """One iteration's completions, ready to learn from."""

    drawn: Drawn
    advantages: Float[Tensor, "prompts k tokens"]
    values: Float[Tensor, "prompts k tokens"] | None
    returns: Float[Tensor, "prompts k tokens"] | None


@dataclass
class Learner:
    """What learns: the policy, and with `gae` a value model, which may be the policy itself with a second head."""

    policy: LanguageModel
    policy_optimizer: torch.optim.Optimizer
    value: LanguageModel | None
    value_optimizer: torch.optim.Optimizer | None
    kl_coef: float
    multiplier: float = 1.0
    """Of kl_coef; kl_budget's controller changes it."""
    errors: float = 0.0
    """The sum that the controller keeps."""

    @property
    def shared(self) -> bool:
        """Whether policy and value are one model."""
        return self.value is self.policy


class PPO(Stage, PPOSettings):
    """Maximises the score minus kl_coef times the KL to the reference, on completions of the current policy."""

    policy: Stage
    reference: Stage
    sft: Stage
    """The KL from it is logged, and held to kl_budget."""
    reward: Stage
    prompts: Part
    snapshots: int = pydantic.Field(0, ge=0)
    """Policies kept on the way, at even distances, to see how they came where they are."""

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write `model/` and `completions.jsonl`, one completion of each iteration to read."""
        device, cost = runtime.start(), Cost()
        torch.manual_seed(self.seed)
        policy_folder, reference_folder = model_in(inputs["policy"]), model_in(inputs["reference"])
        policy = load_policy(policy_folder, device=device, precision=self.precision)
        judges = _judges(self, inputs, policy)
        starts_at_reference = model_digest(policy_folder) == model_digest(reference_folder)
        if self.lora:
            add_lora(policy, self.lora)
        learner = _learner(self, policy, policy_folder, judges.reward, model_in(inputs["reward"]), device)

        asked = unique_prompts(read_table(inputs["prompts"]))
        prompts = [prompt_tokens(policy.tokenizer, prompt) for prompt in asked]
        per_epoch = -(-len(prompts) // self.batch_size)
        total = max(1, round(self.epochs * per_epoch))
        updates = _count_updates(self, len(prompts), total)
        kept = _snapshot_steps(self.snapshots, total)
        checkpoint = Checkpoint(out, _parts(learner), every_minutes=runtime.checkpoint_minutes)
        first, extra = checkpoint.resume()
        trim_jsonl(out / "completions.jsonl", first)
        log = Metrics(out, resumed_at=first)
        if extra:
            cost.resume(extra["cost"])
            learner.kl_coef, learner.multiplier, learner.errors = (
                extra[name] for name in ("kl_coef", "multiplier", "errors")
            )

        weights = Trainable(policy.model)
        sound = weights.copy()
        for step in range(first, total):
            epoch, place = divmod(step, per_epoch)
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            rows = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
            try:
                rollout, metrics = _roll_out(
                    self,
                    learner,
                    judges,
                    [asked[row] for row in rows],
                    [prompts[row] for row in rows],
                    step=step,
                    runtime=runtime,
                    cost=cost,
                )
                _refuse_runaway(self, metrics, step=step, starts_at_reference=starts_at_reference)
                weights.copy_to(sound)
                metrics |= _learn(self, learner, rollout, step=step, updates=updates, runtime=runtime, cost=cost)
                metrics["seconds"] = metrics["sampling_seconds"] + metrics["updating_seconds"]
            except Diverged as error:
                stopped = out / "stopped"
                weights.load_state_dict(sound)
                save_model(policy, stopped)
                raise Diverged(
                    f"step {step + 1} of {total}: {error}; try {_against_divergence(self, updates, step)}; the last "
                    f"policy before that is in {stopped}"
                ) from error
            if self.kl_target is not None:
                learner.kl_coef = adapt_kl_coef(learner.kl_coef, metrics["kl"], target=self.kl_target)
            if self.kl_budget is not None:
                learner.multiplier, learner.errors = steer(
                    learner.errors, metrics["kl_from_sft"], budget=self.kl_budget
                )
            shown = policy.read_text(rollout.drawn.completions[0][0])
            append_jsonl(out / "completions.jsonl", [{"step": step, "prompt": asked[rows[0]], "completion": shown}])
            log.add(step, total, metrics)
            if step + 1 in kept:
                folder = Snapshot(stage=self, number=kept.index(step + 1) + 1).path_in(out)
                save_model(policy, model_in(folder))
            state = {"kl_coef": learner.kl_coef, "multiplier": learner.multiplier, "errors": learner.errors}
            checkpoint.maybe_write(step + 1, {"cost": cost.counts(), **state})

        digest = save_model(policy, model_in(out))
        metrics_rows = log.rows()
        names = ("score", "reward", "kl", "kl_from_sft", "entropy", "end_rate", "completion_tokens")
        figures = {name: mean_of_last(metrics_rows, name) for name in names}
        alarms = tell(policy_alarms(metrics_rows, _remedies(self)))
        finish(out, cost, model=digest, prompts=len(prompts), steps=total, snapshots=kept, alarms=alarms, **figures)
        checkpoint.remove()


def _judges(stage: PPOSettings, inputs: Mapping[str, Path], policy: LanguageModel) -> Judges:
    """Load the frozen models; SFT once where it is the reference."""
    reference_folder, sft_folder = model_in(inputs["reference"]), model_in(inputs["sft"])
    reference = freeze(load_policy(reference_folder, device=policy.device, precision=stage.precision))
    sft = reference
    if model_digest(reference_folder) != model_digest(sft_folder):
        sft = freeze(load_policy(sft_folder, device=policy.device, precision=stage.precision))
    for name, other in (("reference", reference), ("sft", sft)):
        if not same_tokens(other.tokenizer, policy.tokenizer):
            raise InputError(f"ppo.{name}: its tokenizer differs from the policy's; expected the same tokens in both")
    reward = freeze(load_reward_model(model_in(inputs["reward"]), device=policy.device, precision=stage.precision))
    return Judges(reference, sft, reward)


def _snapshot_steps(count: int, total: int) -> list[int]:
    """After which steps a snapshot is kept: the ends of the first `count` of count + 1 equal parts."""
    if count >= total:
        raise InputError(
            f"trace.snapshots: found {count} for {total} iterations of PPO; expected fewer; lower it or "
            "ppo.batch_size, or raise ppo.epochs"
        )
    return [round(total * number / (count + 1)) for number in range(1, count + 1)]


def _count_updates(stage: PPOSettings, prompts: int, iterations: int) -> list[int]:
    """Optimizer steps before each iteration, and at the end those of all: what the learning rate follows.

    The last iteration of a pass over the prompts has fewer of them, and with that perhaps fewer minibatches.
    """
    per_epoch = -(-prompts // stage.batch_size)
    counts = [min(stage.batch_size, prompts - step % per_epoch * stage.batch_size) for step in range(iterations)]
    minibatches = [-(-count // -(-count // stage.minibatches)) for count in counts]
    return list(accumulate((stage.epochs_per_batch * number for number in minibatches), initial=0))


def _learner(
    stage: PPOSettings,
    policy: LanguageModel,
    policy_folder: Path,
    reward: LanguageModel,
    reward_folder: Path,
    device: torch.device,
) -> Learner:
    value: LanguageModel | None = None
    if stage.advantage == "gae":
        if stage.value_init == "shared":
            value = policy
            head = nn.Linear(policy.model.config.get_text_config().hidden_size, 1).to(device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            policy.value_head = head
        elif stage.value_init == "policy":
            value = new_reward_model(policy_folder, seed=stage.seed, device=device, precision=stage.precision)
        else:
            if not same_tokens(reward.tokenizer, policy.tokenizer):
                raise InputError(
                    "ppo.value_init: found `reward`, but the reward model has another tokenizer than the policy; "
                    "expected the same tokens in both; set ppo.value_init: policy"
                )
            value = load_reward_model(reward_folder, device=device, precision=stage.precision)
        if value is not policy and stage.lora:
            add_lora(value, stage.lora)
    value_optimizer = None
    if value is not None and value is not policy:
        value_settings = stage.model_copy(update={"learning_rate": stage.value_learning_rate})
        value_optimizer = make_optimizer(value.parameters(), value_settings)
    return Learner(policy, make_optimizer(policy.parameters(), stage), value, value_optimizer, stage.kl_coef)


def _parts(learner: Learner) -> dict[str, Stateful]:
    parts: dict[str, Stateful] = {
        "policy": Trainable(learner.policy),
        "policy_optimizer": learner.policy_optimizer,
    }
    if learner.value is not None and learner.value_optimizer is not None:
        parts |= {"value": Trainable(learner.value), "value_optimizer": learner.value_optimizer}
    return parts


@torch.no_grad()
def _roll_out(
    stage: PPOSettings,
    learner: Learner,
    judges: Judges,
    asked: Sequence[Prompt],
    prompts: list[list[int]],
    *,
    step: int,
    runtime: Runtime,
    cost: Cost,
) -> tuple[Rollout, dict[str, float]]:
    """Sample, score, shape rewards, advantages."""
    started = time.perf_counter()
    drawn = _draw(stage, learner.policy, prompts, step=step, runtime=runtime, cost=cost)
    judged = _judge(stage, learner.policy, judges, asked, drawn, runtime=runtime, cost=cost)
    anchor_logprobs = judged.reference_logprobs.lerp(judged.sft_logprobs, sft_weight(learner.multiplier))
    rewards = shaped_rewards(
        drawn.logprobs.flatten(0, 1),
        anchor_logprobs.flatten(0, 1),
        drawn.mask.flatten(0, 1),
        judged.scores.flatten(),
        kl_coef=learner.kl_coef * learner.multiplier,
        score_clip=stage.score_clip,
        penalties=stage.missing_end_penalty * (~drawn.ended.flatten()).float(),
    ).view_as(drawn.mask)
    rollout = _with_advantages(stage, learner, drawn, rewards, runtime=runtime, cost=cost)
    metrics = _rollout_metrics(drawn, judged, rewards, rollout)
    metrics |= {"kl_coef": learner.kl_coef * learner.multiplier, "sampling_seconds": time.perf_counter() - started}
    return rollout, metrics


def _draw(
    stage: PPOSettings, policy: LanguageModel, prompts: list[list[int]], *, step: int, runtime: Runtime, cost: Cost
) -> Drawn:
    sampled = sample(
        policy,
        prompts,
        k=stage.completions_per_prompt,
        max_tokens=stage.max_completion_tokens,
        seed=-1 - stage.seed * 1_000_003 - step,  # of its own: Samples and Evaluation draw from the seeds above 0
        token_budget=runtime.sampling_tokens,
    )
    completions = [row.completions for row in sampled]
    lengths = torch.tensor([[len(c) for c in branches] for branches in completions])
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    kept = torch.tensor([value for row in sampled for branch in row.logprobs for value in branch])
    logprobs = torch.zeros(mask.shape).masked_scatter(mask, kept)
    ended = torch.tensor([[policy.has_ended(c) for c in branches] for branches in completions])
    cost.sampled(policy.model, int(lengths.sum()), sum(map(len, prompts)))
    return Drawn(prompts, completions, mask, logprobs, ended)


def _judge(
    stage: PPOSettings,
    policy: LanguageModel,
    judges: Judges,
    asked: Sequence[Prompt],
    drawn: Drawn,
    *,
    runtime: Runtime,
    cost: Cost,
) -> Judged:
    prompts, completions, budget = drawn.prompts, drawn.completions, runtime.microbatch_tokens
    found = scores(judges.reward, *retokenised(judges.reward, policy, asked, prompts, completions), token_budget=budget)
    cost.scored(judges.reward.model, drawn.tokens)
    reference_logprobs = token_logprobs(judges.reference, prompts, completions, token_budget=budget)
    cost.scored(judges.reference.model, drawn.tokens)
    if judges.sft is judges.reference:
        return Judged(found, reference_logprobs, reference_logprobs)
    sft_logprobs = token_logprobs(judges.sft, prompts, completions, token_budget=budget)
    if stage.kl_budget is not None:  # else it is only looked at
        cost.scored(judges.sft.model, drawn.tokens)
    return Judged(found, reference_logprobs, sft_logprobs)


def _with_advantages(
    stage: PPOSettings,
    learner: Learner,
    drawn: Drawn,
    rewards: Float[Tensor, "prompts k tokens"],
    *,
    runtime: Runtime,
    cost: Cost,
) -> Rollout:
    if stage.advantage != "gae":
        compare = rloo_advantages if stage.advantage == "rloo" else grpo_advantages
        return Rollout(drawn, compare(rewards.sum(dim=-1))[..., None] * drawn.mask, None, None)
    value = learner.value
    assert value is not None
    values = read_all(value, drawn.prompts, drawn.completions, "values", token_budget=runtime.microbatch_tokens)
    cost.scored(value.model, drawn.tokens)
    advantages = generalized_advantages(
        rewards.flatten(0, 1),
        values.flatten(0, 1),
        drawn.mask.flatten(0, 1),
        discount=stage.discount,
        gae_lambda=stage.gae_lambda,
    ).view_as(drawn.mask)
    returns = advantages + values
    return Rollout(drawn, whiten(advantages, drawn.mask) if stage.whiten_advantages else advantages, values, returns)


def _rollout_metrics(
    drawn: Drawn, judged: Judged, rewards: Float[Tensor, "prompts k tokens"], rollout: Rollout
) -> dict[str, float]:
    mask, logprobs = drawn.mask, drawn.logprobs
    kl = kl_k1(logprobs, judged.reference_logprobs) * mask
    lengths = mask.sum(dim=-1)
    metrics = {
        "score": float(judged.scores.mean()),
        "score_std": float(judged.scores.std(correction=0)),
        "reward": float(rewards.sum(dim=-1).mean()),
        "kl": float(kl.sum(dim=-1).mean()),
        "kl_per_token": float(masked_mean(kl, mask)),
        "kl_k3": float((kl_k3(logprobs, judged.reference_logprobs) * mask).sum(dim=-1).mean()),
        "kl_abs_per_token": float(masked_mean(kl.abs(), mask)),
        "kl_from_sft": float((kl_k1(logprobs, judged.sft_logprobs) * mask).sum(dim=-1).mean()),
        "completion_tokens": float(lengths.float().mean()),
        "end_rate": float(drawn.ended.float().mean()),
        "distinct": len({tuple(c) for branches in drawn.completions for c in branches}) / drawn.ended.numel(),
        "tokens": float(lengths.sum()),
        "completions": float(drawn.ended.numel()),
    }
    if rollout.values is not None and rollout.returns is not None:
        metrics["value_explained_variance"] = float(explained_variance(rollout.values, rollout.returns, mask))
    return metrics


def _against_divergence(stage: PPOSettings, updates: Sequence[int], step: int) -> str:
    """What to try where an iteration diverged, in words."""
    tips = remedies(updates[step], total=updates[-1], settings=stage, precision=stage.precision)
    if step > 0:
        tips.append(_tighter_anchor(stage))
    if stage.advantage == "gae" and step >= stage.value_warmup_steps:
        tips.append(f"more value_warmup_steps (now {stage.value_warmup_steps})")
    return " or ".join(tips)


def _tighter_anchor(stage: PPOSettings) -> str:
    for name in ("kl_target", "kl_budget"):  # their controllers change kl_coef
        if (value := getattr(stage, name)) is not None:
            return f"a lower {name} (now {value:g})"
    return f"a higher kl_coef (now {stage.kl_coef:g})"


def _remedies(stage: PPOSettings) -> dict[str, str]:
    """What PPO has against each alarm."""
    anchor = _tighter_anchor(stage)
    return {
        "end_rate": f"a higher max_completion_tokens (now {stage.max_completion_tokens}) or missing_end_penalty (now "
        f"{stage.missing_end_penalty:g})",
        "distinct": anchor,
        "entropy": f"{anchor} or a lower learning_rate (now {stage.learning_rate:g})",
        "score_std": f"{anchor}, and read completions.jsonl",
        "completion_tokens": f"{anchor}, and read completions.jsonl",
    }


def _refuse_runaway(stage: PPOSettings, metrics: Mapping[str, float], *, step: int, starts_at_reference: bool) -> None:
    """Stop on a KL that runs away; and on one that is not 0 at step 0 when the policy starts as its reference."""
    if step == 0 and starts_at_reference and metrics["kl_abs_per_token"] > STEP_0_KL[stage.precision]:
        raise RuntimeError(
            f"the policy starts as its own reference, yet their log-probs differ by {metrics['kl_abs_per_token']:.3g} "
            f"nats a token at step 1; expected at most {STEP_0_KL[stage.precision]}: the reference is not what it says"
        )
    if not math.isfinite(metrics["kl_per_token"]) or metrics["kl_per_token"] > stage.max_kl:
        if step == 0:
            raise InputError(
                f"ppo.max_kl: the policy starts {metrics['kl_per_token']:.3g} nats a token from its reference; "
                f"expected at most {stage.max_kl:g}; raise it, or name a reference that is nearer"
            )
        raise Diverged(
            f"the KL to the reference ran away: {metrics['kl_per_token']:.3g} nats a token, more than "
            f"max_kl = {stage.max_kl:g}"
        )


def _learn(
    stage: PPOSettings,
    learner: Learner,
    rollout: Rollout,
    *,
    step: int,
    updates: Sequence[int],
    runtime: Runtime,
    cost: Cost,
) -> dict[str, float]:
    """Update policy and value on a rollout."""
    started = time.perf_counter()
    count = len(rollout.drawn.prompts)
    warming = step < stage.value_warmup_steps and stage.advantage == "gae"
    per_minibatch = -(-count // stage.minibatches)
    seen: list[dict[str, float]] = []
    for epoch in range(stage.epochs_per_batch):
        generator = torch.Generator().manual_seed((stage.seed * 1_000_003 + step) * 101 + epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        for first in range(0, count, per_minibatch):
            rows = order[first : first + per_minibatch]
            rate, value_rate = (
                learning_rate(updates[step] + len(seen), total=updates[-1], settings=stage, peak=peak)
                for peak in (stage.learning_rate, stage.value_learning_rate)
            )
            metrics: dict[str, float] = {}
            if learner.value_optimizer is not None:
                metrics |= _prefixed("value_", _value_step(stage, learner, rollout, rows, value_rate, runtime, cost))
            if not warming or learner.shared:
                metrics |= _policy_step(stage, learner, rollout, rows, rate, runtime, cost, warming=warming)
            seen.append(metrics)
    names = {name for metrics in seen for name in metrics}
    means = {name: sum(metrics[name] for metrics in seen) / len(seen) for name in sorted(names)}
    return {**means, "updating_seconds": time.perf_counter() - started}


def _policy_step(
    stage: PPOSettings,
    learner: Learner,
    rollout: Rollout,
    rows: list[int],
    rate: float,
    runtime: Runtime,
    cost: Cost,
    *,
    warming: bool,
) -> dict[str, float]:
    lm = learner.policy

    def loss(chosen: list[int]) -> tuple[Tensor, Sums]:
        batch = _pack(lm, rollout.drawn, chosen)
        outputs: tuple[Output, ...] = (
            ("logprobs", "entropies", "values") if learner.shared else ("logprobs", "entropies")
        )
        logprobs, entropy, *values = lm(batch, *outputs, detach_values=warming)
        (cost.scored if warming else cost.trained)(lm.model, batch.tokens)
        kept, advantages = (_part(x, chosen, batch.mask) for x in (rollout.drawn.logprobs, rollout.advantages))
        mask, number = batch.mask, batch.mask.sum()
        losses = policy_loss(logprobs.flatten(0, 1), kept.flatten(0, 1), advantages.flatten(0, 1), clip=stage.clip)
        summed = (losses.view_as(mask) * mask).sum()
        with torch.no_grad():
            flat = [x.flatten(0, 1) for x in (logprobs, kept, advantages, mask)]
            metrics = {
                "policy_loss": (summed.detach(), number),
                "entropy": (entropy.sum(), number),
                "approx_kl": ((kl_k3(kept, logprobs) * mask).sum(), number),
                "ratio": (((logprobs - kept).exp() * mask).sum(), number),
                "clip_fraction": (clip_fraction(*flat, clip=stage.clip) * number, number),
            }
        if learner.shared:
            value_summed = _value_losses(stage, values[0], rollout, chosen, mask)
            metrics["value_loss"] = (value_summed.detach(), number)
            value_summed = stage.shared_value_coef * value_summed
            summed = value_summed if warming else summed + value_summed
        return summed, metrics

    lm.train()
    return update(
        learner.policy_optimizer,
        _portions(rollout.drawn, rows, runtime),
        loss,
        count=int(rollout.drawn.mask[rows].sum()),
        max_grad_norm=stage.max_grad_norm,
        rate=rate,
    )


def _value_step(
    stage: PPOSettings, learner: Learner, rollout: Rollout, rows: list[int], rate: float, runtime: Runtime, cost: Cost
) -> dict[str, float]:
    lm, optimizer = learner.value, learner.value_optimizer
    assert lm is not None
    assert optimizer is not None

    def loss(chosen: list[int]) -> tuple[Tensor, Sums]:
        batch = _pack(lm, rollout.drawn, chosen)
        cost.trained(lm.model, batch.tokens)
        return _value_losses(stage, lm(batch, "values"), rollout, chosen, batch.mask), {}

    lm.train()
    return update(
        optimizer,
        _portions(rollout.drawn, rows, runtime),
        loss,
        count=int(rollout.drawn.mask[rows].sum()),
        max_grad_norm=stage.max_grad_norm,
        rate=rate,
    )


def _value_losses(
    stage: PPOSettings, values: Tensor, rollout: Rollout, chosen: list[int], mask: Bool[Tensor, "prompts k tokens"]
) -> Tensor:
    assert rollout.values is not None
    assert rollout.returns is not None
    old, returns = (_part(x, chosen, mask).flatten(0, 1) for x in (rollout.values, rollout.returns))
    losses = value_loss(values.flatten(0, 1), old, returns, clip=stage.value_clip)
    return (losses.view_as(mask) * mask).sum()


def _portions(drawn: Drawn, rows: list[int], runtime: Runtime) -> Iterator[list[int]]:
    lengths = row_lengths([drawn.prompts[row] for row in rows], [drawn.completions[row] for row in rows])
    for part in by_tokens(lengths, runtime.microbatch_tokens):
        yield [rows[place] for place in part]


def _pack(lm: LanguageModel, drawn: Drawn, chosen: list[int]) -> Any:
    return pack(
        [drawn.prompts[row] for row in chosen],
        [drawn.completions[row] for row in chosen],
        share_prompt=lm.shares_prompts,
    ).to(lm.device)


def _part(full: Tensor, chosen: list[int], mask: Tensor) -> Tensor:
    """Some rows of a rollout's tensor, as wide as their own longest completion."""
    return full[chosen][..., : mask.shape[-1]].to(mask.device)


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}
