"""What a run will cost: its stages' memory, tokens, FLOPs and time, and which settings make it fit a device."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.experiments.plan import count_processes, list_stages
from mixpo.experiments.recipe import Recipe, suggest_nearest
from mixpo.experiments.stage_costs import CostPlanner, RatesByPrecision, StageCost
from mixpo.models.adapters import LoraSettings
from mixpo.models.network import Precision
from mixpo.stages.requirements import check_requirements
from mixpo.stages.stage import Part, Snapshot, Stage
from mixpo.stages.stage_cache import StageCache
from mixpo.training.footprint import MemoryFootprint, PlannedRuntime
from mixpo.training.rates import CARDS, measure_rates
from mixpo.training.runtime import MICROBATCH_TOKENS, SAMPLING_GIB, Runtime, find_device_kind

DEFAULT_CARD = "h100"
SMALLEST_MICROBATCH_TOKENS, SMALLEST_SAMPLING_GIB, MOST_GPUS = 256, 0.25, 1024
"""Where the search for settings that fit ends."""
SUGGESTED_RANK = LoraSettings().rank
SERVED = (
    "sampler: vllm: planned with the cache of sampler: local; what a server holds, weights and cache, is not counted, "
    "and takes its share of a GPU that it is on"
)


@dataclass(frozen=True)
class PlannedDevices:
    """The devices that a run is planned for."""

    gpus: int = 0
    """GPUs that share the rows of a stage; 0 plans for this machine's own device."""
    card: str = DEFAULT_CARD
    memory_bytes: float = math.inf
    """Memory of one device; of no bound if not known."""

    @property
    def device(self) -> Any:
        """Kind of the device: `cpu` or `cuda`."""
        return "cuda" if self.gpus else find_device_kind()


def choose_devices(gpus: int | None, memory_gb: float | None, card: str | None) -> PlannedDevices:
    """The devices that the options of the command line name. Raises `InputError` on an unknown card."""
    if card is not None and card not in CARDS:
        raise InputError(f"--gpu: found {card!r}; expected one of {', '.join(CARDS)}{suggest_nearest(card, CARDS)}")
    if gpus is None and card is None:
        return PlannedDevices(memory_bytes=math.inf if memory_gb is None else memory_gb * 1e9)
    name = card or DEFAULT_CARD
    return PlannedDevices(gpus or 1, name, CARDS[name].memory if memory_gb is None else memory_gb * 1e9)


@dataclass(frozen=True)
class RunCosts:
    """Costs of the stages of a run that are not cached, equal ones in one line, and what was assumed."""

    lines: list[tuple[str, StageCost, int]]
    """A stage's name, with its identity if no other costs the same, its cost, and the number of stages that cost it."""
    cached: int
    """Number of stages that are cached."""
    assumptions: list[str]
    refusal: str = ""
    """Which stage does not fit and what to set, as one line; empty if all fit."""


@dataclass(frozen=True)
class _SettingChange:
    """A change of settings that may make a stage fit: its text, and how it changes runtime and stages."""

    text: str
    planned_runtime: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)


def plan_run_costs(recipe: Recipe, devices: PlannedDevices, *, config_path: Path | None = None) -> RunCosts:
    """Plan the costs of a recipe's stages on some devices. Raises `InputError` if a model's config is not at hand."""
    stage_cache = StageCache(recipe.cache.resolve(), recipe.runtime)
    stages = list_stages(recipe)
    missing, cached = list[Stage](), list[Stage]()
    for stage in stages:
        (cached if stage_cache.is_done(stage) else missing).append(stage)
    planned_runtime, get_rates = _plan_runtime(recipe.runtime, devices), _make_rates_lookup(devices)
    planner = CostPlanner(stage_cache, planned_runtime, get_rates, config_path=config_path)
    costs = [cost for stage in missing if (cost := planner.plan_stage(stage)) is not None]
    groups: dict[Any, list[StageCost]] = {}
    for cost in costs:
        key = (type(cost.stage), *(getattr(cost, part.name) for part in fields(cost)[1:]))
        groups.setdefault(key, []).append(cost)
    lines = [(_format_stage_names(group, stage_cache), group[0], len(group)) for group in groups.values()]
    is_alone = planned_runtime.is_sharded and planned_runtime.processes == 1
    assumptions = [
        *["runtime.sharded: planned for one device, which holds whole weights; --gpus plans for several"] * is_alone,
        *[SERVED] * any(getattr(stage, "sampler", "local") == "vllm" for stage in missing),
        *planner.rows.assumptions,
        *dict.fromkeys(get_rates(_get_precision(cost.stage)).describe(_get_precision(cost.stage)) for cost in costs),
    ]
    too_large = [cost for cost in costs if cost.footprint.total > devices.memory_bytes]
    refusal = ""
    if too_large:
        candidates = [*(group[0].stage for group in groups.values()), *cached]  # a changed one is another stage

        def measure(changes: Sequence[_SettingChange]) -> float:
            """Bytes of the largest of the stages to compute after some changes; of no bound if one is then refused."""
            runtime, settings = planned_runtime, dict[str, Any]()
            for change in changes:
                runtime = replace(runtime, **change.planned_runtime)
                settings |= change.stage
            changed_planner, largest = planner.with_runtime(runtime), 0.0
            for stage in (_change_settings(stage, settings) for stage in candidates):
                if stage_cache.is_done(stage):
                    continue
                if _is_refused(stage, recipe, devices, runtime):
                    return math.inf
                if (cost := changed_planner.plan_stage(stage)) is not None:
                    largest = max(largest, cost.footprint.total)
            return largest

        fitting = find_fitting_changes(list(_list_changes(planned_runtime, devices)), measure, devices.memory_bytes)
        largest = max(too_large, key=lambda cost: cost.footprint.total)
        refusal = _format_refusal(largest, devices, fitting)
    return RunCosts(lines, len(stages) - len(missing), assumptions, refusal)


def _is_refused(stage: Stage, recipe: Recipe, devices: PlannedDevices, planned_runtime: PlannedRuntime) -> bool:
    """True if a planned runtime's settings and a stage's exclude each other, or a package is missing."""
    changes = {"sharded": planned_runtime.is_sharded, "offload_optimizer": planned_runtime.offloads_optimizer}
    process_count = planned_runtime.processes if devices.gpus else None
    try:
        check_requirements(
            stage, recipe.runtime.model_copy(update=changes), count_processes(stage, recipe, process_count)
        )
    except InputError:
        return True
    return False


def _format_stage_names(costs: Sequence[StageCost], stage_cache: StageCache) -> str:
    """The name of stages of equal cost: `PPO 1f8a90e2` of one, `Evaluation x4` of several."""
    kind = type(costs[0].stage).__name__
    return f"{kind} x{len(costs)}" if len(costs) > 1 else f"{kind} {stage_cache.compute_identity(costs[0].stage)}"


def find_fitting_changes(
    changes: Sequence[_SettingChange], measure: Callable[[Sequence[_SettingChange]], float], limit: float
) -> list[_SettingChange] | None:
    """The first changes that together bring a measure to a limit, without those that are not needed; None if none do.

    A later change of the same setting replaces an earlier one.
    """
    applied, waiting, position = list[_SettingChange](), list(changes), 0
    smallest = measure([])
    while position < len(waiting):
        change = waiting[position]
        tried = [one for one in applied if not _share_a_setting(one, change)] + [change]
        size = measure(tried)
        if size >= smallest:
            position += 1
            continue
        applied, smallest, position = tried, size, 0  # those before may save now what they did not
        waiting.remove(change)
        if size <= limit:
            for one in list(applied):
                fewer = [other for other in applied if other is not one]
                if measure(fewer) <= limit:
                    applied = fewer
            return applied
    return None


def _share_a_setting(one: _SettingChange, other: _SettingChange) -> bool:
    """True if two changes share a setting."""
    return bool(one.planned_runtime.keys() & other.planned_runtime.keys() or one.stage.keys() & other.stage.keys())


def _list_changes(planned_runtime: PlannedRuntime, devices: PlannedDevices) -> Iterator[_SettingChange]:
    """Yield changes of settings that save memory, those first that cost least: time, then numbers, then devices."""
    tokens = planned_runtime.microbatch_tokens // 2
    while tokens >= SMALLEST_MICROBATCH_TOKENS:
        yield _SettingChange(f"runtime.microbatch_tokens={tokens}", {"microbatch_tokens": tokens})
        tokens //= 2
    gib = planned_runtime.sampling_bytes / 2**31
    while gib >= SMALLEST_SAMPLING_GIB:
        yield _SettingChange(f"runtime.sampling_gib={gib:g}", {"sampling_bytes": round(gib * 2**30)})
        gib /= 2
    if devices.gpus > 1 and not planned_runtime.is_sharded:
        yield _SettingChange("runtime.sharded=true", {"is_sharded": True})
    yield _SettingChange("runtime.activation_checkpointing=true", {"activation_checkpointing": True})
    yield _SettingChange("runtime.offload_optimizer=true", {"offloads_optimizer": True})
    yield _SettingChange("precision=bfloat16", stage={"precision": "bfloat16"})
    rank = {"rank": SUGGESTED_RANK}
    yield _SettingChange(f"lora.rank={SUGGESTED_RANK}", stage={"lora": rank})
    if devices.gpus == 1:
        lora = {**rank, "quantize_base": True}
        yield _SettingChange(f"lora.rank={SUGGESTED_RANK} lora.quantize_base=true", stage={"lora": lora})
    # with what may stand beside cut weights, which whole training in 8 bits and a base in 4 may not
    unquantized = {"lora": {**rank, "quantize_base": False}}
    with_lora = f"lora.rank={SUGGESTED_RANK} lora.quantize_base=false runtime.sharded=true"
    if devices.gpus > 1:
        yield _SettingChange(with_lora, {"is_sharded": True}, unquantized)
    gpus = 2 * devices.gpus
    while 0 < gpus <= MOST_GPUS:
        on_more: dict[str, Any] = {"is_sharded": True, "processes": gpus}
        yield _SettingChange(f"--gpus {gpus} runtime.sharded=true", on_more)
        yield _SettingChange(f"--gpus {gpus} {with_lora}", on_more, unquantized)
        gpus *= 2


def _change_settings(stage: Stage, settings: dict[str, Any]) -> Stage:
    """A stage with some settings changed, in it and in all its inputs that have them."""
    if not settings:
        return stage
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if key in type(stage).model_fields:
            lora: LoraSettings | None = getattr(stage, "lora", None)
            if key == "lora":
                changed[key] = LoraSettings(**value) if lora is None else lora.model_copy(update=value)
            else:
                changed[key] = value
    for name in stage.get_input_stages():
        value = getattr(stage, name)
        if isinstance(value, Part | Snapshot):
            changed[name] = value.model_copy(update={"stage": _change_settings(value.stage, settings)})
        else:
            changed[name] = _change_settings(value, settings)
    return stage.model_copy(update=changed)


def _format_refusal(cost: StageCost, devices: PlannedDevices, fitting: Sequence[_SettingChange] | None) -> str:
    """Format the stage that needs most memory, what was found and expected, and the settings that make all fit."""
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in list_parts(cost.footprint))
    if fitting is None:
        advice = "no setting makes it fit; take a smaller model" + ("" if devices.gpus else " or devices with more")
    else:
        advice = f"set {' '.join(change.text for change in fitting)}"
    return (
        f"{type(cost.stage).__name__}: found a need of {cost.footprint.total / 1e9:.1f} GB a device in {cost.moment} "
        f"({parts}); expected at most {devices.memory_bytes / 1e9:g} GB; {advice}"
    )


def list_parts(footprint: MemoryFootprint) -> list[tuple[str, float]]:
    """The parts of a footprint that are not empty, by name, in bytes."""
    return [(part.name, value) for part in fields(footprint) if (value := getattr(footprint, part.name))]


def _get_precision(stage: Stage) -> Precision:
    """The precision that a stage computes in."""
    precision: Precision = getattr(stage, "precision", "float32")
    return precision


def _plan_runtime(runtime: Runtime, devices: PlannedDevices) -> PlannedRuntime:
    """A runtime's settings as planned for some devices; those not set are what its kind of device takes."""
    tokens, gib = runtime.microbatch_tokens, runtime.sampling_gib
    if "microbatch_tokens" not in runtime.model_fields_set:
        tokens = MICROBATCH_TOKENS[devices.device]
    if "sampling_gib" not in runtime.model_fields_set:
        gib = SAMPLING_GIB[devices.device]
    return PlannedRuntime(
        device=devices.device,
        processes=max(1, devices.gpus),
        is_sharded=runtime.sharded,
        microbatch_tokens=tokens,
        sampling_bytes=round(gib * 2**30),
        activation_checkpointing=runtime.activation_checkpointing,
        offloads_optimizer=runtime.offload_optimizer,
    )


def _make_rates_lookup(devices: PlannedDevices) -> RatesByPrecision:
    """A function that gives a card's rates, or measures this machine's, once a precision."""
    if devices.gpus:
        return lambda precision: CARDS[devices.card]
    return cache(measure_rates)
