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
from mixpo.experiments.expressions import ArmRun, GradientsRun, arm_name, arm_runs, explained, gradients_runs
from mixpo.experiments.plan import refuse_too_long
from mixpo.experiments.preview import first_lines
from mixpo.experiments.recipe import Recipe
from mixpo.experiments.setup import Setup
from mixpo.experiments.workers import Failure, StageDisplay, workers
from mixpo.stages.data import Data, facts
from mixpo.stages.engine import Engine, in_order, read_summary
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.stage import Stage, model_in
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
        return arm_name(self.arm, self.changes)


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


def run(recipe: Recipe, display: Display) -> RunResult:
    """Compute what is missing, and write `recipe.yaml` and `results.json` to the run's folder."""
    runs, measured = arm_runs(recipe), gradients_runs(recipe)
    uses = _uses(runs, measured)
    folder = claim_folder(recipe)
    for link in (folder / "models" / _link_name(run) for run in runs):
        if link.exists() and not link.is_symlink():
            raise InputError(f"{link}: found what no run wrote; expected a link to a model; move it elsewhere")
    engine = Engine(recipe.cache.resolve(), recipe.runtime)
    computed, failures = _compute(recipe, uses, engine, display)
    for link in (folder / "models").glob("*"):
        if link.is_symlink():  # of an earlier recipe
            link.unlink()
    arms = [_result(run, engine, failures, folder / "models") for run in runs]
    gradients = [_gradients_result(run, engine, failures) for run in measured]
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
            known = facts(read_summary(folder)) if cached else []  # said by the stage itself where it was computed
            for line in [*known, *first_lines(recipe, folder, model_in(engine.folder(stage.base)))]:
                display.note(line)
        if isinstance(stage, Pretrained) and stage not in failures:
            refuse_too_long(stage, model_in(engine.folder(stage)), uses)
        order.done(number[stage])

    with workers(engine) as pool:
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
    with explained():
        stage = choose(Setup(recipe, recipe.seeds[0]))
    engine = Engine(recipe.cache.resolve(), recipe.runtime)
    _, failures = _compute(recipe, {needed: [type(stage).__name__] for needed in in_order(stage)}, engine, display)
    return failures.get(stage, engine.folder(stage))


def _uses(runs: list[ArmRun], measured: list[GradientsRun]) -> dict[Stage, list[str]]:
    """Every stage once, inputs first, with the names of the arms and measurements that stand on it."""
    uses: dict[Stage, dict[str, None]] = {}
    for run in runs:
        for root in (run.evaluation, *run.trace):
            for stage in in_order(root):
                uses.setdefault(stage, {})[run.name] = None
    for gradients in measured:
        for stage in in_order(gradients.stage):
            uses.setdefault(stage, {})[f"gradients of {gradients.arm}"] = None
    return {stage: list(names) for stage, names in uses.items()}


def _early_first(stages: Iterable[Stage]) -> list[Stage]:
    """What reads the user's input comes first."""
    return sorted(stages, key=lambda stage: not isinstance(stage, Pretrained | Data))


def _result(run: ArmRun, engine: Engine, failures: Mapping[Stage, Failure], models: Path) -> ArmResult:
    keys = {
        stage: f"{type(stage).__name__}-{engine.identity(stage)}"
        for stage in in_order(run.evaluation)
        if stage not in failures
    }
    read = run.evaluation.inputs()
    own = [read["policy"]]
    if run.evaluation.best_of > 1:
        own.append(read.get("chooser", read["reward"]))
    result = ArmResult(
        run.arm,
        run.seed,
        "done",
        changes=run.changes,
        stages={key: str(engine.folder(stage)) for stage, key in keys.items()},
        needs=list(dict.fromkeys(keys[stage] for root in own for stage in in_order(root) if stage in keys)),
        reward_models={name: keys[read[name]] for name in ("reward", "second", "chooser") if read.get(name) in keys},
    )
    if run.evaluation in failures:
        failed = failures[run.evaluation]
        return replace(result, status="failed", reason=failed.reason, bad_input=failed.bad_input)
    lost = [failures[stage].reason for stage in run.trace if stage in failures]
    model = None
    if run.evaluation.best_of == 1 and isinstance(run.evaluation.policy, Stage):
        link = models / _link_name(run)
        link.symlink_to(model_in(engine.folder(run.evaluation.policy)), target_is_directory=True)
        model = str(link)
    return replace(
        result,
        reason=f"along its training: {lost[0]}" if lost else None,
        model=model,
        evaluation=str(engine.folder(run.evaluation)),
        trace=[str(engine.folder(stage)) for stage in run.trace] if not lost else [],
    )


def _gradients_result(run: GradientsRun, engine: Engine, failures: Mapping[Stage, Failure]) -> GradientsResult:
    failed = failures.get(run.stage)
    folder = None if failed else str(engine.folder(run.stage))
    return GradientsResult(run.arm, run.part, run.seed, folder, failed.reason if failed else None)


def _link_name(run: ArmRun) -> str:
    return re.sub(r"[^\w.=-]+", "-", f"{run.name} {run.seed}")


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
