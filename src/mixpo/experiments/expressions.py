"""What a recipe asks for, as expressions over stages: its arms at every seed, points of sweeps, measurements."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pydantic

from mixpo.data.errors import InputError
from mixpo.experiments.arms import ARMS, dpo, dpo_easy, dpo_hard
from mixpo.experiments.recipe import Recipe, explain_validation_error, suggest_nearest
from mixpo.experiments.setup import Setup
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.gradients import Gradients
from mixpo.stages.ppo import PPO
from mixpo.stages.stage import PolicyStage, Snapshot

MEASURED = {"dpo-easy": dpo_easy, "dpo-hard": dpo_hard, "dpo": dpo}
"""The DPO models of which gradients are measured."""


@dataclass(frozen=True)
class ArmRun:
    """One arm at one seed, as the recipe has it or at a point of a sweep."""

    arm: str
    seed: int
    evaluation: Evaluation
    changes: dict[str, Any] = field(default_factory=dict)
    """The settings, by dotted key, in which the point of a sweep differs from the recipe."""
    trace: tuple[Evaluation, ...] = ()
    """Of the policy that its PPO starts from, and of the snapshots on the way."""

    @property
    def name(self) -> str:
        """What the arm is called in tables."""
        return name_arm(self.arm, self.changes)


@dataclass(frozen=True)
class GradientsRun:
    """Gradients of a DPO model on a part of the sampled pairs."""

    arm: str
    part: str
    seed: int
    stage: Gradients


def name_arm(arm: str, changes: Mapping[str, Any]) -> str:
    """`mpo`, or `mpo selection.threshold=1` at a point of a sweep."""
    return " ".join([arm, *(f"{key}={value}" for key, value in changes.items())])


def expand_arms(recipe: Recipe) -> list[ArmRun]:
    """The recipe's expressions, seed by seed: its arms, then the points of its sweeps that differ from them.

    Raises `InputError` on an unknown arm or key, and on data or a model that is not there.
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
    with explain_stage_errors():
        return [run for seed in recipe.seeds for run in _arm_runs_at(recipe, seed)]


def _arm_runs_at(recipe: Recipe, seed: int) -> list[ArmRun]:
    traced = Setup(recipe, seed, snapshots=recipe.trace.snapshots)
    setups: dict[str, Setup] = {}

    def at(changes: Mapping[str, Any]) -> Setup:
        key = str(changes)
        if key not in setups:
            setups[key] = Setup(recipe.changed(changes), seed)
        return setups[key]

    runs = [
        _traced_run(arm, traced) if arm in recipe.trace.arms else ArmRun(arm, seed, _evaluation(arm, at({})))
        for arm in recipe.arms
    ]
    for sweep in recipe.sweep:
        for point in sweep.points():
            for arm in sweep.arms or recipe.arms:
                changes = _needed(arm, point, at)
                run = ArmRun(arm, seed, _evaluation(arm, at(changes)), changes)
                if run.name not in {other.name for other in runs}:
                    runs.append(run)
    return runs


def _evaluation(arm: str, setup: Setup) -> Evaluation:
    made = ARMS[arm](setup)
    return made if isinstance(made, Evaluation) else setup.evaluation(made)


def _traced_run(arm: str, setup: Setup) -> ArmRun:
    made = ARMS[arm](setup)
    if not isinstance(made, PPO):
        raise InputError(f"trace.arms: found {arm!r}, which ends with {type(made).__name__}; expected one with PPO")
    passed: list[PolicyStage | Snapshot] = [made.policy]
    passed += [Snapshot(stage=made, number=number + 1) for number in range(made.snapshots)]
    return ArmRun(arm, setup.seed, setup.evaluation(made), trace=tuple(setup.evaluation(policy) for policy in passed))


def _needed(arm: str, point: Mapping[str, Any], at: Callable[[Mapping[str, Any]], Setup]) -> dict[str, Any]:
    """The changes at a point of a sweep without which an arm would be another expression."""
    needed = dict(point)
    for key in point:
        fewer = {other: value for other, value in needed.items() if other != key}
        with suppress(InputError):  # without this key the others may not go together
            if _evaluation(arm, at(fewer)) == _evaluation(arm, at(needed)):
                needed = fewer
    return needed


def expand_gradients(recipe: Recipe) -> list[GradientsRun]:
    """Gradients of the DPO models trained on easy, hard and all pairs, each on easy and on hard pairs, if asked for."""
    if not recipe.gradients.pairs:
        return []
    setups = [Setup(recipe, seed) for seed in recipe.seeds]
    return [
        GradientsRun(arm, part.of, setup.seed, setup.gradients(MEASURED[arm](setup), part))
        for setup in setups
        for arm in MEASURED
        for part in (setup.selection.easy, setup.selection.hard)
    ]


@contextmanager
def explain_stage_errors() -> Iterator[None]:
    """What pydantic finds wrong with a stage, as one line a problem."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise InputError("\n".join(explain_validation_error(error))) from error
