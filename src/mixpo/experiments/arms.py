"""The arms: what the paper compares, each an expression over stages. Add one here and name it in a recipe."""

from collections.abc import Callable
from typing import Any

from mixpo.experiments.setup import Setup
from mixpo.stages.dpo import DPO
from mixpo.stages.ppo import PPO
from mixpo.stages.stage import Stage


def sft(r: Setup) -> Stage:
    """Supervised fine-tuning alone."""
    return r.sft


def dpo_base(r: Setup) -> DPO:
    """DPO on the human-labelled pairs as given."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.data.train_pairs, **r.dpo)


def dpo(r: Setup) -> DPO:
    """DPO on all pairs resampled from SFT and ordered by the reward model."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.selection.all, **r.dpo)


def ppo(r: Setup) -> PPO:
    """PPO on all prompts, anchored to SFT."""
    return PPO(policy=r.sft, reference=r.sft, reward=r.reward, prompts=r.selection.all, **r.ppo)


def mpo(r: Setup) -> PPO:
    """DPO on the easy pairs, then PPO on the hard prompts, started from and anchored to the DPO model. Figure 3."""
    anchor = DPO(policy=r.sft, reference=r.sft, pairs=r.selection.easy, **r.dpo)
    return PPO(policy=anchor, reference=anchor, reward=r.reward, prompts=r.selection.hard, **r.ppo)


ARMS: dict[str, Callable[[Setup], Any]] = {"sft": sft, "dpo-base": dpo_base, "dpo": dpo, "ppo": ppo, "mpo": mpo}
