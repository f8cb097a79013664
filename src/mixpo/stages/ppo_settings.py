"""Settings and schedule of PPO, and suggestions of changes if training fails."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, Self

import pydantic

from mixpo.data.errors import InputError
from mixpo.models.adapters import LoraSettings
from mixpo.models.samplers import SamplerName
from mixpo.training.step import OptimizerSettings, suggest_divergence_remedies

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
"""Constants of the paper's software (dschat/rlhf/ppo_trainer.py). Sampling stays at temperature 1 and the score at the
last token: DeepSpeed-Chat samples Llama greedily, and with padding scores one position later."""

GAE_SETTINGS = (
    "discount",
    "gae_lambda",
    "whiten_advantages",
    "value_learning_rate",
    "value_clip",
    "value_init",
    "shared_value_coef",
    "value_warmup_steps",
)
"""Settings without effect if the advantage is not `gae`."""


class PPOSettings(OptimizerSettings):
    """Settings of proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019)."""

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
    sampler: SamplerName = "local"
    """`vllm` draws completions on a vLLM server (`runtime.vllm`)."""
    importance_clip: float | None = pydantic.Field(None, ge=1)
    """With `sampler: vllm`, a token's policy loss is weighted by its probability under the policy over that under the
    server, at most this; not weighted if not given."""
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
    lora: LoraSettings | None = None
    """Adapts the policy and, with a model of its own, the value model, whose head trains whole."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, values: Any, validate: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        """Validator: fill in the values of the preset `deepspeed-chat` where none is given."""
        if not isinstance(values, dict) or values.get("preset") != "deepspeed-chat":
            return validate(values)
        settings = validate({**DEEPSPEED_CHAT, **values})
        settings.model_fields_set.intersection_update(values)  # constants count as set by the preset
        return settings

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "PPOSettings":
        """Validator: raise `InputError` on settings that exclude each other."""
        if self.kl_budget is not None and (self.kl_target is not None or self.kl_coef == 0):
            raise InputError(
                f"ppo.kl_budget: found beside kl_target {self.kl_target} and kl_coef {self.kl_coef:g}; expected no "
                "kl_target and a kl_coef above 0, which the budget's controller multiplies"
            )
        if self.importance_clip is not None and self.sampler == "local":
            raise InputError(
                f"ppo.importance_clip: found {self.importance_clip:g} with sampler: local, which draws from the policy "
                "itself; expected none, or sampler: vllm"
            )
        if self.advantage != "gae" and self.completions_per_prompt < 2:
            raise InputError(
                f"ppo.completions_per_prompt: found {self.completions_per_prompt} with advantage: {self.advantage}; "
                "expected at least 2 completions to compare; 4 is usual"
            )
        return self


def count_updates_before_iterations(settings: PPOSettings, prompt_count: int, iteration_count: int) -> list[int]:
    """Numbers of optimizer steps before each iteration, and as the last entry that of all iterations."""
    size = settings.batch_size
    per_epoch = -(-prompt_count // size)
    counts = [min(size, prompt_count - step % per_epoch * size) for step in range(iteration_count)]
    minibatches = [-(-count // -(-count // settings.minibatches)) for count in counts]
    return list(accumulate((settings.epochs_per_batch * number for number in minibatches), initial=0))


def choose_snapshot_steps(snapshot_count: int, iteration_count: int) -> list[int]:
    """Iterations after which a snapshot is saved: the ends of count + 1 equal parts but the last."""
    if snapshot_count >= iteration_count:
        raise InputError(
            f"trace.snapshots: found {snapshot_count} for {iteration_count} iterations of PPO; expected fewer; lower "
            "it or ppo.batch_size, or raise ppo.epochs"
        )
    return [round(iteration_count * number / (snapshot_count + 1)) for number in range(1, snapshot_count + 1)]


def suggest_ppo_remedies(settings: PPOSettings, updates_before_iterations: Sequence[int], iteration: int) -> str:
    """Changes of settings to try after a divergence at an iteration, as text joined by `or`."""
    tips = suggest_divergence_remedies(
        updates_before_iterations[iteration], total_steps=updates_before_iterations[-1], settings=settings
    )
    if iteration > 0:
        tips.append(suggest_tighter_anchor(settings))
    if settings.advantage == "gae" and iteration >= settings.value_warmup_steps:
        tips.append(f"more value_warmup_steps (now {settings.value_warmup_steps})")
    return " or ".join(tips)


def suggest_tighter_anchor(settings: PPOSettings) -> str:
    """A change of a setting that reduces the KL to the reference, as text."""
    for name in ("kl_target", "kl_budget"):  # their controllers change kl_coef
        if (value := getattr(settings, name)) is not None:
            return f"a lower {name} (now {value:g})"
    return f"a higher kl_coef (now {settings.kl_coef:g})"


def suggest_remedies_by_metric(settings: PPOSettings) -> dict[str, str]:
    """Changes of settings to try against each alarm, as texts by the name of the alarm's metric."""
    anchor = suggest_tighter_anchor(settings)
    return {
        "end_rate": f"a higher max_completion_tokens (now {settings.max_completion_tokens}) or missing_end_penalty "
        f"(now {settings.missing_end_penalty:g})",
        "distinct": anchor,
        "entropy": f"{anchor} or a lower learning_rate (now {settings.learning_rate:g})",
        "score_std": f"{anchor}, and read completions.jsonl",
        "completion_tokens": f"{anchor}, and read completions.jsonl",
    }
