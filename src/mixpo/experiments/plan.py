"""The plan of a run: every stage with its identity, and whether it is cached or why it would be computed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.experiments.cluster import InfraSettings
from mixpo.experiments.expressions import list_arm_runs, list_gradient_runs
from mixpo.experiments.recipe import Recipe, suggest_nearest
from mixpo.models.folders import read_context_length
from mixpo.stages.data import Data
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.requirements import check_requirements
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_settings, sort_topologically
from mixpo.training.job import CHECKPOINT, PORTIONS


@dataclass(frozen=True)
class PlannedStage:
    """One line of a printed plan: a stage, its depth in the tree of an arm, and whether it is cached."""

    kind: str
    """Kind of the stage, and which part of it is read: `Selection.easy`."""
    field: str
    """Name of the input of its parent that it is; empty for the root."""
    identity: str
    depth: int
    done: bool
    reason: str
    """Why it would be computed; empty if it is cached."""
    is_repeated: bool
    """True if an earlier line shows this stage with its inputs."""


def list_plan(recipe: Recipe, process_count: int | None = None) -> list[tuple[str, list[PlannedStage]]]:
    """Return the plan of a run, computing nothing: the name of every arm and measurement with its tree of stages.

    `process_count` processes compute a stage together, if given and no cluster is. Raises `InputError` on errors that
    are known before a stage is computed.
    """
    stage_cache = StageCache(recipe.cache.resolve(), recipe.runtime)
    seen: set[Stage] = set()
    roots = _list_roots(recipe)
    needed = _list_needed_stages(roots)
    check_job_kinds(recipe.infra)
    for stage in needed:
        if not stage_cache.is_done(stage):
            check_requirements(stage, recipe.runtime, count_processes(stage, recipe, process_count))
        if isinstance(stage, Pretrained) and (folder := stage.local_folder) is not None:
            require_context_length(stage, folder, needed)
    trees: dict[str, list[PlannedStage]] = {name: [] for name in roots}
    for name, stages in roots.items():
        for field, stage in stages.items():
            trees[name] += _list_stage_tree(stage, "", field, 0, stage_cache, seen)
    return list(trees.items())


def check_job_kinds(infra: InfraSettings) -> None:
    """Raise `InputError` unless every key of `infra.stages` is a kind of stage."""
    kinds = [kind.__name__ for kind in _list_stage_kinds(Stage)]
    for name in infra.stages:
        if name not in kinds:
            raise InputError(
                f"infra.stages: found {name!r}; expected kinds of stages, such as PPO or Evaluation"
                f"{suggest_nearest(name, kinds)}"
            )


def _list_stage_kinds(kind: type[Stage]) -> list[type[Stage]]:
    """All kinds of stages below one kind, of which this module has imported every one."""
    own = [kind] if "compute" in vars(kind) and kind is not Stage else []
    return [*own, *(one for below in kind.__subclasses__() for one in _list_stage_kinds(below))]


def count_processes(stage: Stage, recipe: Recipe, process_count: int | None = None) -> int:
    """Number of processes that compute a stage together: of its job on a cluster, those given, or those of the run."""
    if not stage.splits_over_processes:
        return 1
    if recipe.infra.cluster is not None:
        job = recipe.infra.choose_job_settings(stage)
        return job.nodes * job.count_tasks()
    return recipe.runtime.processes if process_count is None else process_count


def list_stages(recipe: Recipe) -> list[Stage]:
    """Return all stages of a run, cached or not, each once and after its inputs. Raises `InputError`."""
    return _list_needed_stages(_list_roots(recipe))


def _list_roots(recipe: Recipe) -> dict[str, dict[str, Stage]]:
    """Return the last stages of every arm and measurement, by its name and by what they are in it."""
    roots: dict[str, dict[str, Stage]] = {}
    for run in list_arm_runs(recipe):
        trace = {f"trace {n}": one for n, one in enumerate(run.trace)}
        roots[f"{run.name} (seed {run.seed})"] = {"": run.evaluation, **trace}
    for gradients in list_gradient_runs(recipe):
        name = f"gradients of {gradients.arm} on {gradients.part} (seed {gradients.seed})"
        roots[name] = {"": gradients.stage}
    return roots


def _list_needed_stages(roots: Mapping[str, Mapping[str, Stage]]) -> list[Stage]:
    """Return the stages that roots need, themselves included, each once and after its inputs."""
    return list(
        dict.fromkeys(
            stage for stages in roots.values() for root in stages.values() for stage in sort_topologically(root)
        )
    )


def require_context_length(base: Pretrained, base_folder: Path, stages: Iterable[Stage]) -> None:
    """Raise `InputError` if a stage's longest prompt and completion together exceed the base model's context."""
    context = read_context_length(base_folder)
    for stage in stages:
        completion = getattr(stage, "max_completion_tokens", None)
        prompts = [
            one.max_prompt_tokens for one in sort_topologically(stage) if isinstance(one, Data) and one.base == base
        ]
        if context is not None and completion is not None and prompts and max(prompts) + completion > context:
            raise InputError(
                f"data.max_prompt_tokens: found {max(prompts)} beside max_completion_tokens {completion} of "
                f"{type(stage).__name__}; expected at most {context} together, the model's context; lower one of "
                "them"
            )


def _list_stage_tree(
    stage: Stage, part_read: str, input_name: str, depth: int, stage_cache: StageCache, seen: set[Stage]
) -> list[PlannedStage]:
    """List the plan lines of a stage and its inputs; adds it to `seen`, and omits the inputs if it was there."""
    done, repeated = stage_cache.is_done(stage), stage in seen
    seen.add(stage)
    reason = "" if done else _explain_why_computed(stage, stage_cache)
    kind = f"{type(stage).__name__}.{part_read}" if part_read else type(stage).__name__
    lines = [PlannedStage(kind, input_name, stage_cache.compute_identity(stage), depth, done, reason, repeated)]
    if not repeated:
        for name, source in stage.get_input_stages().items():
            part_read = getattr(getattr(stage, name), "of", "")
            lines += _list_stage_tree(source, part_read, name, depth + 1, stage_cache, seen)
    return lines


def _explain_why_computed(stage: Stage, stage_cache: StageCache) -> str:
    """Return as text why a stage would be computed: missing inputs, a failure, a checkpoint, or changed settings."""
    missing = [name for name, source in stage.get_input_stages().items() if not stage_cache.is_done(source)]
    if missing:
        return f"needs {', '.join(missing)}"
    folder = stage_cache.locate_folder(stage)
    if (folder / "failure.txt").exists():
        return "failed in the last run"
    if any((folder / name).exists() for name in (CHECKPOINT, PORTIONS)):
        return "interrupted; resumes where it was"
    own = _select_own_settings(stage.model_dump(mode="json"), stage)
    differences = []
    for sibling in folder.parent.glob("*/"):
        other = _select_own_settings(read_stage_settings(sibling), stage)
        changed = [key for key in own if key in other and own[key] != other[key]]
        if changed:
            differences.append([f"{key} {other[key]} → {own[key]}" for key in changed])
    if not differences:
        return "not computed yet"
    return "changed: " + ", ".join(min(differences, key=len)[:3])


def _select_own_settings(settings: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return a stage's settings without the keys of its inputs."""
    inputs = stage.get_input_stages()
    return {key: value for key, value in settings.items() if key not in inputs}
