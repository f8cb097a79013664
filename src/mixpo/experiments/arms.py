"""The arms, each an expression over the stages that all arms share; a new one is entered in `ARMS` too."""

from collections.abc import Callable

from mixpo.experiments.shared_stages import SharedStages
from mixpo.stages.dpo import DPO
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.ppo import PPO
from mixpo.stages.sft import SFT
from mixpo.stages.stage import PolicyStage


def sft(shared: SharedStages) -> SFT:
    """Supervised fine-tuning alone."""
    return shared.sft


def best_of_n(shared: SharedStages) -> Evaluation:
    """Best-of-n: the SFT completion with the highest score of n, without further training."""
    return shared.evaluation(shared.sft, best_of=shared.recipe.best_of)


def dpo_base(shared: SharedStages) -> DPO:
    """DPO on the human-labelled pairs."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.pairs, **shared.dpo)


def dpo(shared: SharedStages) -> DPO:
    """DPO on all pairs resampled from SFT and ordered by the reward model."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.samples.pairs, **shared.dpo)


def dpo_easy(shared: SharedStages) -> DPO:
    """DPO on the easy pairs: MPO's first stage, and a bar of Figure 4."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.selection.easy, **shared.dpo)


def dpo_hard(shared: SharedStages) -> DPO:
    """DPO on the hard pairs. Figure 4."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.selection.hard, **shared.dpo)


def ppo(shared: SharedStages) -> PPO:
    """PPO on all prompts with SFT as reference."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.samples.pairs, **shared.ppo)


def ppo_easy(shared: SharedStages) -> PPO:
    """PPO on the easy prompts. Figure 4."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.selection.easy, **shared.ppo)


def ppo_hard(shared: SharedStages) -> PPO:
    """PPO on the hard prompts: MPO-reverse's first stage, and a bar of Figure 4."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.selection.hard, **shared.ppo)


def mpo(shared: SharedStages) -> PPO:
    """DPO on the easy pairs, then PPO on the hard prompts from the DPO model, which is its reference too. Figure 3."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard, **shared.ppo)


def mpo_sft_kl(shared: SharedStages) -> PPO:
    """MPO with SFT as the reference of its PPO. Table 6."""
    return PPO(policy=dpo_easy(shared), reference=shared.sft, prompts=shared.selection.hard, **shared.ppo)


def mpo_reverse(shared: SharedStages) -> DPO:
    """PPO on the hard prompts, then DPO on the easy pairs from the PPO model, which is its reference too. Table 6."""
    anchor = ppo_hard(shared)
    return DPO(policy=anchor, reference=anchor, pairs=shared.selection.easy, **shared.dpo)


def mpo_reverse_sft(shared: SharedStages) -> DPO:
    """MPO-reverse with SFT as the reference of its DPO. Table 6."""
    return DPO(policy=ppo_hard(shared), reference=shared.sft, pairs=shared.selection.easy, **shared.dpo)


def mpo_rloo(shared: SharedStages) -> PPO:
    """MPO whose second stage is RLOO: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard, **shared.grouped_ppo("rloo"))


def mpo_grpo(shared: SharedStages) -> PPO:
    """MPO whose second stage is GRPO: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard, **shared.grouped_ppo("grpo"))


ARMS: dict[str, Callable[[SharedStages], PolicyStage | Evaluation]] = {
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
