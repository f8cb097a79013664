"""The arms, each an expression over the stages that all arms share; a new one is entered in `ARMS` too."""

from collections.abc import Callable

from mixpo.experiments.shared_stages import SharedStages
from mixpo.stages.dpo import DPO
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.ppo import PPO
from mixpo.stages.sft import SFT
from mixpo.stages.stage import PolicyStage


def sft(shared: SharedStages) -> SFT:
    """Build the arm SFT: the stage of supervised fine-tuning alone."""
    return shared.sft


def best_of_n(shared: SharedStages) -> Evaluation:
    """Build the arm best-of-n: the evaluation of the highest-scored of n SFT completions a prompt, without training."""
    return shared.build_evaluation(shared.sft, best_of=shared.recipe.best_of)


def dpo_base(shared: SharedStages) -> DPO:
    """Build the arm DPO-base: the stage of DPO from SFT on the human-labelled pairs."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.pairs, **shared.dpo)


def dpo(shared: SharedStages) -> DPO:
    """Build the arm DPO: the stage of DPO from SFT on all pairs sampled from SFT and ordered by the reward model."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.samples.pairs, **shared.dpo)


def dpo_easy(shared: SharedStages) -> DPO:
    """Build the arm DPO-easy: the stage of DPO from SFT on the easy pairs; MPO's first stage, and a bar of Figure 4."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.selection.easy_pairs, **shared.dpo)


def dpo_hard(shared: SharedStages) -> DPO:
    """Build the arm DPO-hard: the stage of DPO from SFT on the hard pairs; a bar of Figure 4."""
    return DPO(policy=shared.sft, reference=shared.sft, pairs=shared.selection.hard_pairs, **shared.dpo)


def ppo(shared: SharedStages) -> PPO:
    """Build the arm PPO: the stage of PPO from SFT on all prompts, with SFT as reference."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.samples.pairs, **shared.ppo)


def ppo_easy(shared: SharedStages) -> PPO:
    """Build the arm PPO-easy: the stage of PPO from SFT on the easy prompts; a bar of Figure 4."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.selection.easy_pairs, **shared.ppo)


def ppo_hard(shared: SharedStages) -> PPO:
    """Build the arm PPO-hard: the stage of PPO from SFT on the hard prompts; MPO-reverse's first stage. Figure 4."""
    return PPO(policy=shared.sft, reference=shared.sft, prompts=shared.selection.hard_pairs, **shared.ppo)


def mpo(shared: SharedStages) -> PPO:
    """Build MPO: the stage of PPO on hard prompts, from the model of DPO on easy pairs, its reference too. Figure 3."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard_pairs, **shared.ppo)


def mpo_sft_kl(shared: SharedStages) -> PPO:
    """Build MPO with SFT, instead of the DPO model, as the reference of its PPO. Table 6."""
    return PPO(policy=dpo_easy(shared), reference=shared.sft, prompts=shared.selection.hard_pairs, **shared.ppo)


def mpo_reverse(shared: SharedStages) -> DPO:
    """Build MPO-reverse: DPO on easy pairs, from the model of PPO on hard prompts, its reference too. Table 6."""
    anchor = ppo_hard(shared)
    return DPO(policy=anchor, reference=anchor, pairs=shared.selection.easy_pairs, **shared.dpo)


def mpo_reverse_sft(shared: SharedStages) -> DPO:
    """Build MPO-reverse with SFT, instead of the PPO model, as the reference of its DPO. Table 6."""
    return DPO(policy=ppo_hard(shared), reference=shared.sft, pairs=shared.selection.easy_pairs, **shared.dpo)


def mpo_rloo(shared: SharedStages) -> PPO:
    """Build MPO with RLOO as second stage: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard_pairs, **shared.grouped_ppo("rloo"))


def mpo_grpo(shared: SharedStages) -> PPO:
    """Build MPO with GRPO as second stage: advantages from completions of one prompt instead of a value model."""
    anchor = dpo_easy(shared)
    return PPO(policy=anchor, reference=anchor, prompts=shared.selection.hard_pairs, **shared.grouped_ppo("grpo"))


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
