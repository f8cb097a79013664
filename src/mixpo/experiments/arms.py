"""The arms of the paper, each an expression over stages. Add one here and name it in a recipe."""

from collections.abc import Callable

from mixpo.experiments.setup import Setup
from mixpo.stages.dpo import DPO
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.ppo import PPO
from mixpo.stages.sft import SFT
from mixpo.stages.stage import PolicyStage


def sft(r: Setup) -> SFT:
    """Supervised fine-tuning alone."""
    return r.sft


def best_of_n(r: Setup) -> Evaluation:
    """Best-of-n: the SFT completion with the highest score of n, without further training."""
    return r.evaluation(r.sft, best_of=r.recipe.best_of)


def dpo_base(r: Setup) -> DPO:
    """DPO on the human-labelled pairs."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.pairs, **r.dpo)


def dpo(r: Setup) -> DPO:
    """DPO on all pairs resampled from SFT and ordered by the reward model."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.samples.pairs, **r.dpo)


def dpo_easy(r: Setup) -> DPO:
    """DPO on the easy pairs: MPO's first stage, and a bar of Figure 4."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.selection.easy, **r.dpo)


def dpo_hard(r: Setup) -> DPO:
    """DPO on the hard pairs. Figure 4."""
    return DPO(policy=r.sft, reference=r.sft, pairs=r.selection.hard, **r.dpo)


def ppo(r: Setup) -> PPO:
    """PPO on all prompts with SFT as reference."""
    return PPO(policy=r.sft, reference=r.sft, prompts=r.samples.pairs, **r.ppo)


def ppo_easy(r: Setup) -> PPO:
    """PPO on the easy prompts. Figure 4."""
    return PPO(policy=r.sft, reference=r.sft, prompts=r.selection.easy, **r.ppo)


def ppo_hard(r: Setup) -> PPO:
    """PPO on the hard prompts: MPO-reverse's first stage, and a bar of Figure 4."""
    return PPO(policy=r.sft, reference=r.sft, prompts=r.selection.hard, **r.ppo)


def mpo(r: Setup) -> PPO:
    """DPO on the easy pairs, then PPO on the hard prompts from the DPO model, which is its reference too. Figure 3."""
    anchor = dpo_easy(r)
    return PPO(policy=anchor, reference=anchor, prompts=r.selection.hard, **r.ppo)


def mpo_sft_kl(r: Setup) -> PPO:
    """MPO with SFT as the reference of its PPO. Table 6."""
    return PPO(policy=dpo_easy(r), reference=r.sft, prompts=r.selection.hard, **r.ppo)


def mpo_reverse(r: Setup) -> DPO:
    """PPO on the hard prompts, then DPO on the easy pairs from the PPO model, which is its reference too. Table 6."""
    anchor = ppo_hard(r)
    return DPO(policy=anchor, reference=anchor, pairs=r.selection.easy, **r.dpo)


def mpo_reverse_sft(r: Setup) -> DPO:
    """MPO-reverse with SFT as the reference of its DPO. Table 6."""
    return DPO(policy=ppo_hard(r), reference=r.sft, pairs=r.selection.easy, **r.dpo)


def mpo_rloo(r: Setup) -> PPO:
    """MPO whose second stage is RLOO: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(r)
    return PPO(policy=anchor, reference=anchor, prompts=r.selection.hard, **r.grouped_ppo("rloo"))


def mpo_grpo(r: Setup) -> PPO:
    """MPO whose second stage is GRPO: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(r)
    return PPO(policy=anchor, reference=anchor, prompts=r.selection.hard, **r.grouped_ppo("grpo"))


ARMS: dict[str, Callable[[Setup], PolicyStage | Evaluation]] = {
    arm.__name__.replace("_", "-"): arm
    for arm in (
        sft,
        best_of_n,
        dpo_base,
        dpo,
        dpo_easy,
        dpo_hard,
        ppo,
        ppo_easy,
        ppo_hard,
        mpo,
        mpo_sft_kl,
        mpo_reverse,
        mpo_reverse_sft,
        mpo_rloo,
        mpo_grpo,
    )
}
"""Arms by name. An arm returns its policy or, if it trains none, its evaluation."""
