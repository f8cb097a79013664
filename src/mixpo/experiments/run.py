"""Running a recipe: every stage once, shared by the arms; what fails takes only the arms that need it along."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, Protocol

import yaml

from mixpo import __version__
from mixpo.data.errors import InputError
from mixpo.experiments.expressions import (
    ArmRun,
    GradientsRun,
    expand_arms,
    expand_gradients,
    explain_stage_errors,
    name_arm,
)
from mixpo.experiments.plan import refuse_too_long
from mixpo.experiments.preview import first_lines
from mixpo.experiments.recipe import Recipe
from mixpo.experiments.setup import Setup
from mixpo.experiments.workers import Failure, StageDisplay, open_executor
from mixpo.stages.data import Data, describe_row_facts
from mixpo.stages.engine import Engine, read_summary, sort_topologically
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.stage import Stage, model_folder
from mixpo.training.record import write_json

FORMAT = 3
"""Of `results.json`."""


class Display(Protocol):
    """Whoever watches a run."""

    def begin(self, stage: str, identity: str, arms: Sequence[str]) -> StageDisplay:
        """A stage starts to compute."""

    def note(self, text: str) -> None:
        """A line worth reading now, of no stage that computes."""


@dataclass
class ArmResult:
    """What became of an arm at a seed."""

    arm: str
    seed: int
    status: Literal["done", "failed"]
    reason: str | None = None
    bad_input: bool = False
    model: str | None = None
    """The aligned model: a link in the run's folder to where it is in the cache."""
    evaluation: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)
    """Folders of the evaluations of its PPO's start and snapshots."""
    stages: dict[str, str] = field(default_factory=dict)
    """The absolute folder of every stage behind its evaluation, by kind and identity: `DPO-1a2b3c4d`."""
    needs: list[str] = field(default_factory=list)
    """Those of them that the arm itself stands on: without what the evaluation alone reads."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Those that its evaluation reads, by the field that holds them: reward, second, chooser."""

    @property
    def name(self) -> str:
        """What the arm is called in tables."""
        return name_arm(self.arm, self.changes)


@dataclass
class GradientsResult:
    """What became of a measurement of gradients."""

    arm: str
    part: str
    seed: int
    folder: str | None
    reason: str | None = None


@dataclass
class RunResult:
    """What `results.json` holds."""

    name: str
    arms: list[ArmResult]
    gradients: list[GradientsResult]
    computed: int
    """Stages computed in this run."""
    found: int
    """Stages found in the cache."""


def run_recipe(recipe: Recipe, display: Display) -> RunResult:
    """Compute what is missing, and write `recipe.yaml` and `results.json` to the run's folder."""
    runs, measured = expand_arms(recipe), expand_gradients(recipe)
    uses = _uses(runs, measured)
    folder = claim_folder(recipe)
    for link in (folder / "models" / _link_name(run_recipe) for run_recipe in runs):
        if link.exists() and not link.is_symlink():
            raise InputError(f"{link}: found what no run wrote; expected a link to a model; move it elsewhere")
    engine = Engine(recipe.cache.resolve(), recipe.runtime)
    computed, failures = _compute(recipe, uses, engine, display)
    for link in (folder / "models").glob("*"):
        if link.is_symlink():  # of an earlier recipe
            link.unlink()
    arms = [_result(run_recipe, engine, failures, folder / "models") for run_recipe in runs]
    gradients = [_gradients_result(run_recipe, engine, failures) for run_recipe in measured]
    result = RunResult(recipe.name, arms, gradients, computed, len(uses) - computed - len(failures))
    write_json(
        folder / "results.json",
        {"format": FORMAT, "mixpo": __version__, "recipe": recipe.resolved(), **asdict(result)},
    )
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf8")
    return result


def _compute(
    recipe: Recipe, uses: Mapping[Stage, Sequence[str]], engine: Engine, display: Display
) -> tuple[int, dict[Stage, Failure]]:
    """Compute every stage that is not there, after its inputs; how many were, and what failed."""
    stages = _early_first(uses)
    for stage in stages:
        engine.is_done(stage)  # a damaged folder is told before the first stage computes
    number = {stage: place for place, stage in enumerate(stages)}
    order = TopologicalSorter(
        {place: [number[source] for source in stage.inputs().values()] for stage, place in number.items()}
    )
    order.prepare()
    computed, failures = 0, dict[Stage, Failure]()
    ready: list[int] = []

    def over(stage: Stage, *, cached: bool = False) -> None:
        if isinstance(stage, Data) and stage not in failures:
            folder = engine.folder(stage)
            known = (
                describe_row_facts(read_summary(folder)) if cached else []
            )  # said by the stage itself where it was computed
            for line in [*known, *first_lines(recipe, folder, model_folder(engine.folder(stage.base)))]:
                display.note(line)
        if isinstance(stage, Pretrained) and stage not in failures:
            refuse_too_long(stage, model_folder(engine.folder(stage)), uses)
        order.done(number[stage])

    with open_executor(engine) as pool:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()])
            if ready and pool.free:
                stage = stages[ready.pop(0)]
                lost = [source for source in stage.inputs().values() if source in failures]
                if lost:
                    failures[stage] = failures[lost[0]]
                if lost or engine.is_done(stage):
                    over(stage, cached=not lost)
                else:
                    pool.start(stage, display.begin(type(stage).__name__, engine.identity(stage), uses[stage]))
            else:
                stage, shown, outcome = pool.ended()
                if not isinstance(outcome, Failure):
                    computed += 1
                elif outcome.bad_input and isinstance(stage, Data | Pretrained):
                    raise InputError(outcome.reason)
                else:
                    failures[stage] = outcome
                shown.end(outcome)
                over(stage)
    return computed, failures


def run_stage(recipe: Recipe, choose: Callable[[Setup], Stage], display: Display) -> Path | Failure:
    """Compute one stage of a recipe's first seed and what it needs; its folder, or why there is none."""
    claim_folder(recipe)
    with explain_stage_errors():
        stage = choose(Setup(recipe, recipe.seeds[0]))
    engine = Engine(recipe.cache.resolve(), recipe.runtime)
    _, failures = _compute(
        recipe, {needed: [type(stage).__name__] for needed in sort_topologically(stage)}, engine, display
    )
    return failures.get(stage, engine.folder(stage))


def _uses(runs: list[ArmRun], measured: list[GradientsRun]) -> dict[Stage, list[str]]:
    """Every stage once, inputs first, with the names of the arms and measurements that stand on it."""
    uses: dict[Stage, dict[str, None]] = {}
    for run_recipe in runs:
        for root in (run_recipe.evaluation, *run_recipe.trace):
            for stage in sort_topologically(root):
                uses.setdefault(stage, {})[run_recipe.name] = None
    for gradients in measured:
        for stage in sort_topologically(gradients.stage):
            uses.setdefault(stage, {})[f"gradients of {gradients.arm}"] = None
    return {stage: list(names) for stage, names in uses.items()}


def _early_first(stages: Iterable[Stage]) -> list[Stage]:
    """What reads the user's input comes first."""
    return sorted(stages, key=lambda stage: not isinstance(stage, Pretrained | Data))


def _result(run_recipe: ArmRun, engine: Engine, failures: Mapping[Stage, Failure], models: Path) -> ArmResult:
    keys = {
        stage: f"{type(stage).__name__}-{engine.identity(stage)}"
        for stage in sort_topologically(run_recipe.evaluation)
        if stage not in failures
    }
    read = run_recipe.evaluation.inputs()
    own = [read["policy"]]
    if run_recipe.evaluation.best_of > 1:
        own.append(read.get("chooser", read["reward"]))
    result = ArmResult(
        run_recipe.arm,
        run_recipe.seed,
        "done",
        changes=run_recipe.changes,
        stages={key: str(engine.folder(stage)) for stage, key in keys.items()},
        needs=list(dict.fromkeys(keys[stage] for root in own for stage in sort_topologically(root) if stage in keys)),
        reward_models={name: keys[read[name]] for name in ("reward", "second", "chooser") if read.get(name) in keys},
    )
    if run_recipe.evaluation in failures:
        failed = failures[run_recipe.evaluation]
        return replace(result, status="failed", reason=failed.reason, bad_input=failed.bad_input)
    lost = [failures[stage].reason for stage in run_recipe.trace if stage in failures]
    model = None
    if run_recipe.evaluation.best_of == 1 and isinstance(run_recipe.evaluation.policy, Stage):
        link = models / _link_name(run_recipe)
        link.symlink_to(model_folder(engine.folder(run_recipe.evaluation.policy)), target_is_directory=True)
        model = str(link)
    return replace(
        result,
        reason=f"along its training: {lost[0]}" if lost else None,
        model=model,
        evaluation=str(engine.folder(run_recipe.evaluation)),
        trace=[str(engine.folder(stage)) for stage in run_recipe.trace] if not lost else [],
    )


def _gradients_result(run_recipe: GradientsRun, engine: Engine, failures: Mapping[Stage, Failure]) -> GradientsResult:
    failed = failures.get(run_recipe.stage)
    folder = None if failed else str(engine.folder(run_recipe.stage))
    return GradientsResult(run_recipe.arm, run_recipe.part, run_recipe.seed, folder, failed.reason if failed else None)


def _link_name(run_recipe: ArmRun) -> str:
    return re.sub(r"[^\w.=-]+", "-", f"{run_recipe.name} {run_recipe.seed}")


def claim_folder(recipe: Recipe) -> Path:
    """Make the run's folder and the cache. Raises `InputError` where they cannot be written."""
    folder = recipe.folder
    earlier = folder / "results.json"
    try:
        for place in (folder, folder / "models", recipe.cache):
            place.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=place):
                pass
        for file in (folder / "recipe.yaml", folder / "report.html", earlier):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        found = _format_of(earlier)
        if found not in (None, FORMAT):
            raise InputError(
                f"{folder}: found a run folder of format {found}, written by another version of mixpo; expected format "
                f"{FORMAT}; choose another folder with out=PATH"
            )
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: found a place that cannot be written ({error.strerror}); expected a folder "
            "for results; choose others with out=PATH and cache=PATH"
        ) from error
    return folder


def _format_of(results: Path) -> Any:
    if not results.exists():
        return None
    try:
        return json.loads(results.read_text(encoding="utf8")).get("format")
    except (ValueError, AttributeError):
        return "unknown"
