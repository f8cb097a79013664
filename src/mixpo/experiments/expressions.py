"""Expansion of a recipe into expressions over stages: arms at every seed, points of sweeps, measurements."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mixpo.data.errors import InputError
from mixpo.experiments.arms import ARMS, dpo, dpo_easy, dpo_hard
from mixpo.experiments.recipe import Recipe, explain_validation_errors, suggest_nearest
from mixpo.experiments.shared_stages import SharedStages
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.gradients import Gradients
from mixpo.stages.ppo import PPO
from mixpo.stages.stage import PolicyStage, Snapshot

GRADIENT_ARMS = {"dpo-easy": dpo_easy, "dpo-hard": dpo_hard, "dpo": dpo}
"""Arms whose DPO models have their gradients measured."""


@dataclass(frozen=True)
class ArmRun:
    """An arm at one seed, with the recipe's settings or at a point of a sweep."""

    arm: str
    seed: int
    evaluation: Evaluation
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings, by dotted key, in which the point of a sweep differs from the recipe."""
    trace: tuple[Evaluation, ...] = ()
    """Evaluations of the initial policy of its PPO and of the snapshots."""

    @property
    def name(self) -> str:
        """Name of the arm in tables."""
        return format_arm_name(self.arm, self.changes)


@dataclass(frozen=True)
class GradientsRun:
    """A measurement of the gradients of a DPO model on a part of the sampled pairs."""

    arm: str
    part: str
    seed: int
    stage: Gradients


def format_arm_name(arm: str, changes: Mapping[str, Any]) -> str:
    """Format the name of an arm: `mpo`, or `mpo selection.threshold=1` at a point of a sweep."""
    return " ".join([arm, *(f"{key}={value}" for key, value in changes.items())])


def expand_arms(recipe: Recipe) -> list[ArmRun]:
    """Expand a recipe into its arms at every seed, then the points of its sweeps that differ from them.

    Raises `InputError` on an unknown arm or key, and on missing data or a missing model.
    """
    for key, arms in [
        ("arms", recipe.arms),
        ("trace.arms", recipe.trace.arms),
        *(("sweep.arms", sweep.arms or ()) for sweep in recipe.sweep),
    ]:
        for arm in arms:
            if arm not in ARMS:
                raise InputError(f"{key}: found {arm!r}{suggest_nearest(arm, ARMS)}")
    for arm in recipe.trace.arms:
        if arm not in recipe.arms:
            raise InputError(f"trace.arms: found {arm!r}, which is not among the arms; expected one of them")
    with explain_validation_errors():
        return [run for seed in recipe.seeds for run in _expand_arms_at_seed(recipe, seed)]


def _expand_arms_at_seed(recipe: Recipe, seed: int) -> list[ArmRun]:
    traced_setup = SharedStages(recipe, seed, snapshots=recipe.trace.snapshots)
    setups: dict[str, SharedStages] = {}

    def get_shared_stages(changes: Mapping[str, Any]) -> SharedStages:
        key = str(changes)
        if key not in setups:
            setups[key] = SharedStages(recipe.with_changes(changes), seed)
        return setups[key]

    runs = [
        _build_traced_run(arm, traced_setup)
        if arm in recipe.trace.arms
        else ArmRun(arm, seed, _build_evaluation(arm, get_shared_stages({})))
        for arm in recipe.arms
    ]
    for sweep in recipe.sweep:
        for point in sweep.list_points():
            for arm in sweep.arms or recipe.arms:
                changes = _drop_changes_without_effect(arm, point, get_shared_stages)
                run = ArmRun(arm, seed, _build_evaluation(arm, get_shared_stages(changes)), changes)
                if run.name not in {other.name for other in runs}:
                    runs.append(run)
    return runs


def _build_evaluation(arm: str, setup: SharedStages) -> Evaluation:
    result = ARMS[arm](setup)
    return result if isinstance(result, Evaluation) else setup.evaluation(result)


def _build_traced_run(arm: str, setup: SharedStages) -> ArmRun:
    """Build an arm with evaluations of its PPO's initial policy and snapshots."""
    ppo = ARMS[arm](setup)
    if not isinstance(ppo, PPO):
        raise InputError(f"trace.arms: found {arm!r}, which ends with {type(ppo).__name__}; expected one with PPO")
    policies: list[PolicyStage | Snapshot] = [ppo.policy]
    policies += [Snapshot(stage=ppo, number=number + 1) for number in range(ppo.snapshots)]
    return ArmRun(arm, setup.seed, setup.evaluation(ppo), trace=tuple(setup.evaluation(policy) for policy in policies))


def _drop_changes_without_effect(
    arm: str, point: Mapping[str, Any], get_shared_stages: Callable[[Mapping[str, Any]], SharedStages]
) -> dict[str, Any]:
    """Return the changes at a point of a sweep without those that leave the stages of an arm as they are."""
    changes = dict(point)
    for key in point:
        fewer = {other: value for other, value in changes.items() if other != key}
        with suppress(InputError):  # without this key the others may be invalid together
            if _build_evaluation(arm, get_shared_stages(fewer)) == _build_evaluation(arm, get_shared_stages(changes)):
                changes = fewer
    return changes


def expand_gradients(recipe: Recipe) -> list[GradientsRun]:
    """List the gradient measurements of a recipe: one for each arm of `GRADIENT_ARMS`, seed, and easy or hard pairs.

    Empty if `gradients.pairs` is 0.
    """
    if not recipe.gradients.pairs:
        return []
    setups = [SharedStages(recipe, seed) for seed in recipe.seeds]
    return [
        GradientsRun(arm, part.of, setup.seed, setup.gradients(GRADIENT_ARMS[arm](setup), part))
        for setup in setups
        for arm in GRADIENT_ARMS
        for part in (setup.selection.easy, setup.selection.hard)
    ]
