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
    """An arm to be computed at one seed: its evaluation stage, evaluations along its PPO, and a sweep's changes."""

    arm: str
    seed: int
    evaluation: Evaluation
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings, by dotted key, in which the point of a sweep differs from the recipe."""
    trace: tuple[Evaluation, ...] = ()
    """Evaluations of the initial policy of its PPO and of the snapshots."""

    @property
    def name(self) -> str:
        """The arm's name in tables: `mpo`, or `mpo selection.threshold=1` at a point of a sweep."""
        return format_arm_name(self.arm, self.changes)


@dataclass(frozen=True)
class GradientsRun:
    """A gradient measurement to be computed, of one arm's DPO model at one seed on the easy or the hard pairs."""

    arm: str
    part: str
    seed: int
    stage: Gradients


def format_arm_name(arm: str, changes: Mapping[str, Any]) -> str:
    """Format the name of an arm: `mpo`, or `mpo selection.threshold=1` at a point of a sweep."""
    return " ".join([arm, *(f"{key}={value}" for key, value in changes.items())])


def list_arm_runs(recipe: Recipe) -> list[ArmRun]:
    """List a recipe's arms at every seed as `ArmRun`s, then the points of its sweeps that differ from them.

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
        return [run for seed in recipe.seeds for run in _list_arm_runs_at_seed(recipe, seed)]


def _list_arm_runs_at_seed(recipe: Recipe, seed: int) -> list[ArmRun]:
    """List the arms at one seed as `ArmRun`s, then the points of sweeps that differ from them."""
    traced_setup = SharedStages(recipe, seed, snapshots=recipe.trace.snapshots)
    setups: dict[str, SharedStages] = {}

    def get_shared_stages(changes: Mapping[str, Any]) -> SharedStages:
        """Return the shared stages of the changed recipe, the same object at every call with equal changes."""
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
        for point in sweep.list_setting_combinations():
            for arm in sweep.arms or recipe.arms:
                changes = _drop_changes_without_effect(arm, point, get_shared_stages)
                run = ArmRun(arm, seed, _build_evaluation(arm, get_shared_stages(changes)), changes)
                if run.name not in {other.name for other in runs}:
                    runs.append(run)
    return runs


def _build_evaluation(arm: str, shared: SharedStages) -> Evaluation:
    """Build the evaluation stage of an arm, which is computed later."""
    result = ARMS[arm](shared)
    return result if isinstance(result, Evaluation) else shared.build_evaluation(result)


def _build_traced_run(arm: str, shared: SharedStages) -> ArmRun:
    """Build an arm with evaluations of its PPO's initial policy and snapshots. `InputError` if it has no PPO."""
    ppo = ARMS[arm](shared)
    if not isinstance(ppo, PPO):
        raise InputError(f"trace.arms: found {arm!r}, which ends with {type(ppo).__name__}; expected one with PPO")
    policies: list[PolicyStage | Snapshot] = [ppo.policy]
    policies += [Snapshot(stage=ppo, number=number + 1) for number in range(ppo.snapshots)]
    trace = tuple(shared.build_evaluation(policy) for policy in policies)
    return ArmRun(arm, shared.seed, shared.build_evaluation(ppo), trace=trace)


def _drop_changes_without_effect(
    arm: str, sweep_point: Mapping[str, Any], get_shared_stages: Callable[[Mapping[str, Any]], SharedStages]
) -> dict[str, Any]:
    """Return a copy of the changes at a sweep's point without those that leave an arm's stages as they are."""
    changes = dict(sweep_point)
    for key in sweep_point:
        fewer = {other: value for other, value in changes.items() if other != key}
        with suppress(InputError):  # without this key the others may be invalid together
            if _build_evaluation(arm, get_shared_stages(fewer)) == _build_evaluation(arm, get_shared_stages(changes)):
                changes = fewer
    return changes


def list_gradient_runs(recipe: Recipe) -> list[GradientsRun]:
    """List a recipe's gradient measurements: one for each arm of `GRADIENT_ARMS`, seed, and easy or hard pairs.

    Empty if `gradients.pairs` is 0.
    """
    if not recipe.gradients.pairs:
        return []
    setups = [SharedStages(recipe, seed) for seed in recipe.seeds]
    return [
        GradientsRun(arm, part.of, setup.seed, setup.build_gradients(GRADIENT_ARMS[arm](setup), part))
        for setup in setups
        for arm in GRADIENT_ARMS
        for part in (setup.selection.easy_pairs, setup.selection.hard_pairs)
    ]
