"""Run of a recipe: every stage once, shared by the arms; a failed stage fails only the arms that need it."""

import errno
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, Protocol

import yaml

from mixpo import __version__
from mixpo.data.errors import InputError
from mixpo.experiments.executors import open_executor
from mixpo.experiments.expressions import ArmRun, GradientsRun, format_arm_name, list_arm_runs, list_gradient_runs
from mixpo.experiments.plan import check_job_kinds, count_processes, require_context_length
from mixpo.experiments.preview import describe_training_data
from mixpo.experiments.recipe import Recipe, explain_validation_errors
from mixpo.experiments.shared_stages import SharedStages
from mixpo.experiments.workers import StageDisplay, StageFailure, follow_stages
from mixpo.stages.data import Data, describe_data_statistics
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.requirements import check_requirements
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_summary, sort_topologically
from mixpo.training.job import locate_model_folder
from mixpo.training.record import write_json
from mixpo.training.rendezvous import join_rendezvous

FORMAT = 3
"""Version of `results.json`."""


class RunDisplay(Protocol):
    """Interface of a display of a run's progress."""

    def start_stage(self, stage_kind: str, identity: str, arms: Sequence[str]) -> StageDisplay:
        """Show that a stage is being computed for these arms, and return the display of its progress."""

    def on_message(self, text: str) -> None:
        """Show a line of text about the run."""


@dataclass
class ArmResult:
    """Result of an arm at a seed as `results.json` holds it: status, why it failed, and the folders of its stages."""

    arm: str
    seed: int
    status: Literal["done", "failed"]
    reason: str | None = None
    bad_input: bool = False
    model: str | None = None
    """Path of the aligned model: a link in the run's folder to the model in the cache."""
    evaluation: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)
    """Folders of the evaluations of its PPO's initial policy and snapshots."""
    stages: dict[str, str] = field(default_factory=dict)
    """Absolute folder of every stage that its evaluation depends on, by kind and identity: `DPO-1a2b3c4d`."""
    needs: list[str] = field(default_factory=list)
    """Keys of the stages that the arm itself depends on, without those that only its evaluation reads."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Keys of the reward models of its evaluation, by field: reward, second, chooser."""

    @property
    def name(self) -> str:
        """The arm's name in tables: `mpo`, or `mpo selection.threshold=1` at a point of a sweep."""
        return format_arm_name(self.arm, self.changes)


@dataclass
class GradientsResult:
    """Result of a gradient measurement as `results.json` holds it: its folder, or None and why it failed."""

    arm: str
    part: str
    seed: int
    folder: str | None
    reason: str | None = None


@dataclass
class RunResult:
    """Content of `results.json`: results of arms and gradient measurements, and numbers of stages."""

    name: str
    arms: list[ArmResult]
    gradients: list[GradientsResult]
    computed: int
    """Number of stages computed in this run."""
    found: int
    """Number of stages found in the cache."""


def run_recipe(recipe: Recipe, display: RunDisplay) -> RunResult:
    """Compute a recipe's missing stages, write `results.json` and return it; arms that fail are in it, not raised."""
    runs, gradients_runs = list_arm_runs(recipe), list_gradient_runs(recipe)
    arms_by_stage = _map_stages_to_arms(runs, gradients_runs)
    folder = prepare_run_folder(recipe)
    for link in (folder / "models" / _format_model_link_name(run) for run in runs):
        if link.exists() and not link.is_symlink():
            raise InputError(f"{link}: found a file that no run wrote; expected a link to a model; move it elsewhere")
    stage_cache = StageCache(recipe.cache.resolve(), recipe.runtime, join_rendezvous())
    computed, failures = _compute_stages(recipe, arms_by_stage, stage_cache, display)
    for link in (folder / "models").glob("*"):
        if link.is_symlink():  # of an earlier recipe
            link.unlink()
    arms = [_build_arm_result(run, stage_cache, failures, folder / "models") for run in runs]
    gradients = [_build_gradients_result(run, stage_cache, failures) for run in gradients_runs]
    result = RunResult(recipe.name, arms, gradients, computed, len(arms_by_stage) - computed - len(failures))
    write_json(
        folder / "results.json",
        {"format": FORMAT, "mixpo": __version__, "recipe": recipe.dump_settings(), **asdict(result)},
    )
    text = yaml.safe_dump(recipe.dump_settings(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf8")
    return result


def _compute_stages(
    recipe: Recipe, arms_by_stage: Mapping[Stage, Sequence[str]], stage_cache: StageCache, display: RunDisplay
) -> tuple[int, dict[Stage, StageFailure]]:
    """Compute every stage that is not cached, after its inputs; return how many, and the failures by stage."""
    # the stages that read the user's model and data before all others
    stages = sorted(arms_by_stage, key=lambda stage: not isinstance(stage, Pretrained | Data))
    counts, rendezvous = set[int](), stage_cache.rendezvous
    check_job_kinds(recipe.infra)
    for stage in stages:
        if not stage_cache.is_done(stage):  # raises on a damaged folder before the first stage is computed
            count = count_processes(stage, recipe, rendezvous.count if rendezvous else None)
            check_requirements(stage, recipe.runtime, count)
            if stage.splits_over_processes:
                counts.add(count)
    if recipe.runtime.sharded and counts == {1}:
        display.on_message(
            "runtime.sharded: every stage has one process, which holds whole weights; runtime.processes, a launcher or "
            "infra start several"
        )
    index = {stage: n for n, stage in enumerate(stages)}
    if any(getattr(stage, "sampler", "local") == "vllm" and not stage_cache.is_done(stage) for stage in stages):
        stage_cache.runtime.check_vllm(is_here=recipe.infra.cluster is None)  # else where jobs alone may reach it
    order = TopologicalSorter(
        {n: [index[source] for source in stage.get_input_stages().values()] for stage, n in index.items()}
    )
    order.prepare()
    computed, failures = 0, dict[Stage, StageFailure]()
    ready: list[int] = []

    def finish_stage(stage: Stage, *, cached: bool = False) -> None:
        """Show the rows of a data stage, check the context of a base model, and free the stages that wait for it."""
        if isinstance(stage, Data) and stage not in failures:
            folder = stage_cache.locate_folder(stage)
            base_model = locate_model_folder(stage_cache.locate_folder(stage.base))
            lines = describe_data_statistics(read_stage_summary(folder)) if cached else []  # else it has shown them
            for line in [*lines, *describe_training_data(recipe, folder, base_model)]:
                display.on_message(line)
        if isinstance(stage, Pretrained) and stage not in failures:
            require_context_length(stage, locate_model_folder(stage_cache.locate_folder(stage)), arms_by_stage)
        order.done(index[stage])

    with open_executor(stage_cache, recipe.infra, recipe.run_folder.resolve() / "jobs") as executor:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()])
            if ready and executor.can_submit_stage:
                stage = stages[ready.pop(0)]
                failed_inputs = [source for source in stage.get_input_stages().values() if source in failures]
                if failed_inputs:
                    failures[stage] = failures[failed_inputs[0]]
                if failed_inputs or stage_cache.is_done(stage):
                    finish_stage(stage, cached=not failed_inputs)
                else:
                    kind, identity = type(stage).__name__, stage_cache.compute_identity(stage)
                    executor.submit_stage(stage, display.start_stage(kind, identity, arms_by_stage[stage]))
            else:
                stage, stage_display, outcome = executor.wait_for_outcome()
                if not isinstance(outcome, StageFailure):
                    computed += 1
                elif outcome.bad_input and isinstance(stage, Data | Pretrained):
                    raise InputError(outcome.reason)
                else:
                    failures[stage] = outcome
                stage_display.on_end(outcome)
                finish_stage(stage)
    return computed, failures


def compute_stage(recipe: Recipe, choose: Callable[[SharedStages], Stage], display: RunDisplay) -> Path | StageFailure:
    """Compute the stage that `choose` picks at the first seed, and its inputs; return its folder or its failure."""
    prepare_run_folder(recipe)
    with explain_validation_errors():
        stage = choose(SharedStages(recipe, recipe.seeds[0]))
    stage_cache = StageCache(recipe.cache.resolve(), recipe.runtime, join_rendezvous())
    names = {source: [type(stage).__name__] for source in sort_topologically(stage)}
    _, failures = _compute_stages(recipe, names, stage_cache, display)
    return failures.get(stage, stage_cache.locate_folder(stage))


def follow_main_process(recipe: Recipe) -> bool:
    """In a process that another one leads, compute its share of every stage until that one ends; return True if so."""
    rendezvous = join_rendezvous()
    if rendezvous is None or rendezvous.rank == 0:
        return False
    follow_stages(StageCache(recipe.cache.resolve(), recipe.runtime, rendezvous))
    return True


def _map_stages_to_arms(arm_runs: list[ArmRun], gradients_runs: list[GradientsRun]) -> dict[Stage, list[str]]:
    """Map every stage, inputs first, to the names of the arms and measurements that depend on it."""
    names_by_stage: dict[Stage, dict[str, None]] = {}
    for run in arm_runs:
        for root in (run.evaluation, *run.trace):
            for stage in sort_topologically(root):
                names_by_stage.setdefault(stage, {})[run.name] = None
    for gradients in gradients_runs:
        for stage in sort_topologically(gradients.stage):
            names_by_stage.setdefault(stage, {})[f"gradients of {gradients.arm}"] = None
    return {stage: list(names) for stage, names in names_by_stage.items()}


def _build_arm_result(
    arm_run: ArmRun, stage_cache: StageCache, failures: Mapping[Stage, StageFailure], models_folder: Path
) -> ArmResult:
    """Build the result of an arm whose stages are computed or failed, and link its model into the models' folder."""
    keys = {
        stage: f"{type(stage).__name__}-{stage_cache.compute_identity(stage)}"
        for stage in sort_topologically(arm_run.evaluation)
        if stage not in failures
    }
    inputs = arm_run.evaluation.get_input_stages()
    own = [inputs["policy"]]
    if arm_run.evaluation.best_of > 1:
        own.append(inputs.get("chooser", inputs["reward"]))
    result = ArmResult(
        arm_run.arm,
        arm_run.seed,
        "done",
        changes=arm_run.changes,
        stages={key: str(stage_cache.locate_folder(stage)) for stage, key in keys.items()},
        needs=list(dict.fromkeys(keys[stage] for root in own for stage in sort_topologically(root) if stage in keys)),
        reward_models={
            name: keys[inputs[name]] for name in ("reward", "second", "chooser") if inputs.get(name) in keys
        },
    )
    if failure := failures.get(arm_run.evaluation):
        return replace(result, status="failed", reason=failure.reason, bad_input=failure.bad_input)
    trace_failures = [failures[stage].reason for stage in arm_run.trace if stage in failures]
    model = None
    if arm_run.evaluation.best_of == 1 and isinstance(arm_run.evaluation.policy, Stage):
        link = models_folder / _format_model_link_name(arm_run)
        target = locate_model_folder(stage_cache.locate_folder(arm_run.evaluation.policy))
        link.symlink_to(target, target_is_directory=True)
        model = str(link)
    return replace(
        result,
        reason=f"along its training: {trace_failures[0]}" if trace_failures else None,
        model=model,
        evaluation=str(stage_cache.locate_folder(arm_run.evaluation)),
        trace=[str(stage_cache.locate_folder(stage)) for stage in arm_run.trace] if not trace_failures else [],
    )


def _build_gradients_result(
    run: GradientsRun, stage_cache: StageCache, failures: Mapping[Stage, StageFailure]
) -> GradientsResult:
    """Build the result of a gradient measurement whose stage is computed or failed."""
    if failure := failures.get(run.stage):
        return GradientsResult(run.arm, run.part, run.seed, None, failure.reason)
    return GradientsResult(run.arm, run.part, run.seed, str(stage_cache.locate_folder(run.stage)))


def _format_model_link_name(arm_run: ArmRun) -> str:
    """Format the file name of the link to an arm's model: its name and seed, with dashes for special characters."""
    return re.sub(r"[^\w.=-]+", "-", f"{arm_run.name} {arm_run.seed}")


def prepare_run_folder(recipe: Recipe) -> Path:
    """Create the run's folder and the cache, and return the former. Raises `InputError` if they are not writable."""
    folder = recipe.run_folder
    earlier = folder / "results.json"
    try:
        for place in (folder, folder / "models", recipe.cache):
            place.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=place):
                pass
        for file in (folder / "recipe.yaml", folder / "report.html", earlier):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if earlier.exists():
            try:
                version = json.loads(earlier.read_text(encoding="utf8")).get("format")
            except (ValueError, AttributeError):
                version = "unknown"
            if version is not None:
                require_run_format(folder, version, "choose another folder with out=PATH")
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: found a place that cannot be written ({error.strerror}); expected a folder "
            "for results; choose others with out=PATH and cache=PATH"
        ) from error
    return folder


def require_run_format(folder: Path, version: object, fix_hint: str) -> None:
    """Raise `InputError` unless a run's `results.json` has this version's format; the hint ends the message."""
    if version != FORMAT:
        raise InputError(
            f"{folder}: found a run folder of format {version}, written by another version of mixpo; expected format "
            f"{FORMAT}; {fix_hint}"
        )
