"""The plan of a run: every stage with its identity, whether it is there, and why it would be computed."""

from dataclasses import dataclass
from typing import Any

from mixpo.experiments.expressions import arm_runs, gradients_runs
from mixpo.experiments.recipe import Recipe
from mixpo.stages.engine import Engine, read_settings
from mixpo.stages.stage import Stage
from mixpo.training import checkpoint


@dataclass(frozen=True)
class Planned:
    """A stage in the tree of an arm."""

    kind: str
    field: str
    """The input of its parent that it is; empty for the root."""
    identity: str
    depth: int
    done: bool
    why: str
    """Why it would be computed; empty if it is there."""
    shown_before: bool
    """Whether an earlier line shows this stage with its inputs."""


def plan(recipe: Recipe) -> list[tuple[str, list[Planned]]]:
    """The tree of every arm and measurement by its name, root first. Computes nothing."""
    engine = Engine(recipe.cache.resolve(), recipe.runtime)
    seen: set[Stage] = set()
    roots: list[tuple[str, dict[str, Stage]]] = [
        (
            f"{run.name} (seed {run.seed})",
            {"": run.evaluation, **{f"along {n}": one for n, one in enumerate(run.trace)}},
        )
        for run in arm_runs(recipe)
    ]
    roots += [
        (f"gradients of {run.arm} on {run.part} (seed {run.seed})", {"": run.stage}) for run in gradients_runs(recipe)
    ]
    return [
        (name, [line for field, stage in stages.items() for line in _tree(stage, field, 0, engine, seen)])
        for name, stages in roots
    ]


def _tree(stage: Stage, field: str, depth: int, engine: Engine, seen: set[Stage]) -> list[Planned]:
    done, before = engine.is_done(stage), stage in seen
    seen.add(stage)
    why = "" if done else _why(stage, engine)
    lines = [Planned(type(stage).__name__, field, engine.identity(stage), depth, done, why, before)]
    if not before:
        for name, source in stage.inputs().items():
            lines += _tree(source, name, depth + 1, engine, seen)
    return lines


def _why(stage: Stage, engine: Engine) -> str:
    missing = [name for name, source in stage.inputs().items() if not engine.is_done(source)]
    if missing:
        return f"its {' and '.join(missing)} would be computed"
    folder = engine.folder(stage)
    if (folder / "failure.txt").exists():
        return "failed last time"
    if (folder / checkpoint.FILE).exists():
        return "was interrupted; goes on from its checkpoint"
    own = _own_settings(stage.model_dump(mode="json"), stage)
    differences = []
    for sibling in folder.parent.glob("*/"):
        other = _own_settings(read_settings(sibling), stage)
        changed = [key for key in own if key in other and own[key] != other[key]]
        if changed:
            differences.append([f"{key} {other[key]} → {own[key]}" for key in changed])
    if not differences:
        return "not computed yet"
    return "changed: " + ", ".join(min(differences, key=len)[:3])


def _own_settings(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """A stage's settings without its inputs."""
    inputs = stage.inputs()
    return {key: value for key, value in config.items() if key not in inputs}
