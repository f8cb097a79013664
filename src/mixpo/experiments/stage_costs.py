"""What a stage will cost before it is computed: tokens, FLOPs, seconds, and the memory of its fullest moment.

`CostPlanner` says of each kind of stage which models it holds, and what it does with them; `StageCostTally` adds it up.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mixpo.data.branches import BranchLengths, split_into_microbatches
from mixpo.data.sources import expand_home
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.experiments.row_lengths import RowLengthEstimator
from mixpo.models.adapters import LoraSettings
from mixpo.models.network import Precision
from mixpo.models.shapes import ModelShape, read_config_file, read_gguf_config, read_hub_config, read_model_shape
from mixpo.models.sources import make_world_config, resolve_package_file
from mixpo.stages.dpo import CHECKED_PAIRS, DPO, PROBED_PROMPTS
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.gradients import Gradients
from mixpo.stages.ppo import PPO
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.reward_model import RewardModel
from mixpo.stages.samples import Samples
from mixpo.stages.selection import Selection
from mixpo.stages.sft import SFT
from mixpo.stages.stage import Snapshot, Stage
from mixpo.stages.stage_cache import StageCache
from mixpo.training.footprint import (
    AdapterSizes,
    MemoryFootprint,
    ModelInMemory,
    PlannedRuntime,
    count_cache_bytes,
    count_element_bytes,
    count_row_tokens,
    measure_models,
    measure_process,
    measure_sampling,
    measure_scoring_pass,
    measure_training_pass,
    measure_working_weights,
)
from mixpo.training.job import locate_model_folder
from mixpo.training.rates import DeviceRates
from mixpo.training.step import select_batch_rows

SEARCHED_BATCHES = 64
"""Batches among which the largest microbatches are sought."""
MEASURED_MICROBATCHES = 3
"""Largest microbatches whose memory is counted."""
STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight on disk by its type."""

TrainedStage = SFT | RewardModel | DPO | PPO
RatesByPrecision = Callable[[Precision], DeviceRates]


@dataclass(frozen=True)
class StageCost:
    """What one stage will cost, and the parts of its fullest moment in memory."""

    stage: Stage
    footprint: MemoryFootprint
    moment: str
    """What the stage does when it needs most memory."""
    tokens: float
    """Trained on, sampled and scored, prompts included."""
    flops: float
    seconds: float
    """Of passes and decoding; loading, saving and the making of rows are left out."""


@dataclass
class StageCostTally:
    """The work of a stage and its moments in memory, added up while it is planned."""

    precision: Precision
    runtime: PlannedRuntime
    rates: DeviceRates
    moments: dict[str, MemoryFootprint] = field(default_factory=dict)
    """The fullest moment of each name."""
    tokens: float = 0
    flops: float = 0
    seconds: float = 0

    def add_moment(self, name: str, *parts: MemoryFootprint) -> None:
        """Add a moment in which all parts are in memory."""
        footprint = sum(parts, MemoryFootprint())
        if name not in self.moments or footprint.total > self.moments[name].total:
            self.moments[name] = footprint

    def measure_models(self, *models: ModelInMemory | None) -> MemoryFootprint:
        """Footprint of models that are in memory together; what is cut over devices was whole while it was loaded."""
        loaded = [one for one in models if one is not None]
        held = measure_models(loaded, self.precision, self.runtime)
        for model in loaded if self.runtime.shards > 1 else ():
            whole = measure_models([model], self.precision, replace(self.runtime, is_sharded=False))
            self.add_moment("loading", MemoryFootprint(weights=held.weights + whole.weights))
        return held

    def add_updates(
        self,
        name: str,
        model: ModelInMemory,
        held: MemoryFootprint,
        rows: Sequence[BranchLengths],
        *,
        batch_size: int,
        seed: int,
        times: float,
        predicts: bool = True,
    ) -> None:
        """Add optimizer steps of a model on batches of rows, `times` over, while `held` is in memory."""
        trained, frozen = model.multiplied_weights
        self._add_passes(times * count_row_tokens(rows), 6.0 * trained + 4.0 * frozen)
        if self.runtime.activation_checkpointing:  # time, but no work of the method
            self.seconds += 2.0 * (trained + frozen) * times * count_row_tokens(rows) / self._pass_rate
        working = measure_working_weights(model, self.precision, self.runtime)
        microbatches, accumulates = self._find_largest_microbatches(rows, batch_size, seed)
        shards = self.runtime.shards if model.trains_whole else 1
        own_gradients = 0.0 if accumulates else 4 * model.trained_weights / shards
        beginning = replace(held, gradients=held.gradients - own_gradients)  # none are left of the step before
        for microbatch in microbatches:
            passed = measure_training_pass(model, microbatch, self.precision, self.runtime, predicts=predicts)
            self.add_moment(name, beginning, working, passed)
            ending = measure_scoring_pass(model.shape, microbatch, self.precision, self.runtime, predicts=False)
            self.add_moment(name, held, working, ending)

    def add_scoring(
        self,
        name: str,
        model: ModelInMemory,
        held: MemoryFootprint,
        rows: Sequence[BranchLengths],
        *,
        times: float = 1,
        predicts: bool = True,
    ) -> None:
        """Add passes of a model over rows without gradients, while `held` is in memory."""
        self._add_passes(times * count_row_tokens(rows), 2.0 * sum(model.multiplied_weights))
        working = measure_working_weights(model, self.precision, self.runtime)
        for microbatch in self._find_largest_microbatches(rows, len(rows), 0)[0]:
            passed = measure_scoring_pass(model.shape, microbatch, self.precision, self.runtime, predicts=predicts)
            self.add_moment(name, held, working, passed)

    def add_sampling(
        self,
        model: ModelInMemory,
        held: MemoryFootprint,
        prompts: Sequence[int],
        *,
        k: int,
        max_tokens: int,
        times: float = 1,
    ) -> None:
        """Add the sampling of k completions of prompts of these lengths, all at their longest.

        A step of decoding reads all weights, and the keys and values of all tokens before, or takes as long as its
        products do.
        """
        working = measure_working_weights(model, self.precision, self.runtime, whole=True)
        sampled = measure_sampling(model.shape, prompts, self.precision, self.runtime, k=k, max_tokens=max_tokens)
        self.add_moment("sampling", held, working, sampled)
        weights, token_bytes = sum(model.multiplied_weights), count_cache_bytes(model.shape, self.precision)
        own_prompts = -(-len(prompts) // self.runtime.processes)
        rows_at_once = max(1, self.runtime.sampling_bytes // (token_bytes * k * (max(prompts) + max_tokens)))
        steps = max_tokens * -(-own_prompts // rows_at_once)
        drawn, share = k * max_tokens * len(prompts), own_prompts / len(prompts)
        keys = share * token_bytes * k * max_tokens * sum(prompt + max_tokens / 2 for prompt in prompts)
        read = steps * weights * count_element_bytes(self.precision) + keys
        reading = read / (self.rates.bandwidth * self.rates.bandwidth_share)
        multiplying = share * 2.0 * weights * drawn / self._product_rate
        self.seconds += times * max(reading, multiplying)
        self.tokens, self.flops = self.tokens + times * drawn, self.flops + times * 2.0 * weights * drawn
        self._add_passes(times * sum(prompts), 2.0 * weights)

    @property
    def _pass_rate(self) -> float:
        """FLOPs a second that passes reach on all devices."""
        return self._product_rate * self.runtime.processes

    @property
    def _product_rate(self) -> float:
        """FLOPs a second that passes reach on one device."""
        return self.rates.flops[self.precision] * self.rates.product_share

    def _add_passes(self, tokens: float, flops_per_token: float) -> None:
        """Add passes over tokens, which the devices share."""
        self.tokens += tokens
        self.flops += flops_per_token * tokens
        self.seconds += flops_per_token * tokens / self._pass_rate

    def _find_largest_microbatches(
        self, rows: Sequence[BranchLengths], batch_size: int, seed: int
    ) -> tuple[list[list[BranchLengths]], bool]:
        """The microbatches with most tokens, and whether a batch has several, whose gradients are added."""
        if len(set(rows)) == 1:  # as where they are not read yet: no search, which takes seconds
            own = -(-min(batch_size, len(rows)) // self.runtime.processes)
            fitting = max(1, self.runtime.microbatch_tokens // sum(rows[0]))
            return [[rows[0]] * min(own, fitting)], own > fitting
        batch_count = min(SEARCHED_BATCHES, -(-len(rows) // batch_size))
        microbatches, most = list[list[BranchLengths]](), 0
        for step in range(batch_count):
            indices = select_batch_rows(step, len(rows), batch_size=batch_size, seed=seed)[:: self.runtime.processes]
            batch = [rows[index] for index in indices]
            parts = list(split_into_microbatches([sum(row) for row in batch], self.runtime.microbatch_tokens))
            microbatches += [[batch[index] for index in part] for part in parts]
            most = max(most, len(parts))
        microbatches.sort(key=count_row_tokens, reverse=True)
        return microbatches[:MEASURED_MICROBATCHES], most > 1


class CostPlanner:
    """Plans what stages cost in a planned runtime, from the configs of models and the lengths of rows."""

    def __init__(
        self,
        stage_cache: StageCache,
        runtime: PlannedRuntime,
        get_rates: RatesByPrecision,
        *,
        config_path: Path | None = None,
    ) -> None:
        self.runtime, self.get_rates = runtime, get_rates
        self.stage_cache, self.config_path = stage_cache, config_path
        self.rows = RowLengthEstimator(stage_cache)
        self._shapes: dict[Stage, ModelShape] = {}

    def with_runtime(self, runtime: PlannedRuntime) -> Self:
        """A planner for another planned runtime, which shares what this one has read."""
        planner = copy.copy(self)
        planner.runtime = runtime
        return planner

    def plan_stage(self, stage: Stage) -> StageCost | None:
        """Plan a stage's cost; None if it computes with no model. Raises `InputError` where a config is missing."""
        planners: dict[type[Stage], Callable[[Any, StageCostTally], None]] = {
            Pretrained: self._plan_pretrained,
            SFT: self._plan_sft,
            RewardModel: self._plan_reward_model,
            DPO: self._plan_dpo,
            PPO: self._plan_ppo,
            Samples: self._plan_samples,
            Evaluation: self._plan_evaluation,
            Gradients: self._plan_gradients,
        }
        if type(stage) not in planners:
            return None
        precision: Precision = getattr(stage, "precision", "float32")
        lora: LoraSettings | None = getattr(stage, "lora", None)
        runtime = replace(
            self.runtime,
            is_sharded=self.runtime.is_sharded and stage.cuts_weights,
            optimizer=getattr(stage, "optimizer", "adamw"),
            quantizes_frozen=lora is not None and lora.quantize_base,
        )
        tally = StageCostTally(precision, runtime, self.get_rates(precision))
        planners[type(stage)](stage, tally)
        moment = max(tally.moments, key=lambda name: tally.moments[name].total)
        footprint = tally.moments[moment] + measure_process(precision, runtime)
        return StageCost(stage, footprint, moment, tally.tokens, tally.flops, tally.seconds)

    def _plan_pretrained(self, stage: Pretrained, tally: StageCostTally) -> None:
        """The model is compared with transformers', on one device; on a CPU beside what it is made from.

        It has the type of its file, and float32 in one module at a time, of which the embedding is the largest.
        """
        shape = self.get_shape(stage)
        stored_bytes = _count_stored_bytes(stage, shape)
        from_folder = stage.local_folder is not None or self.runtime.device != "cpu"
        source = MemoryFootprint(weights=0 if from_folder else stored_bytes * shape.weights)
        widened = MemoryFootprint(weights=4 * shape.embedding_weights if stored_bytes < 4 else 0)
        tally.add_moment("loading", MemoryFootprint(weights=stored_bytes * shape.weights), widened, source)

    def _plan_sft(self, stage: SFT, tally: StageCostTally) -> None:
        policy = self._hold_trained(stage.base, stage.lora)
        held = tally.measure_models(policy)
        rows = self.rows.list_rows(stage.data, "demonstrations", stage.max_completion_tokens)
        self._add_epochs(stage, tally, policy, held, rows)
        self._add_saving(stage, tally, policy, held)

    def _plan_reward_model(self, stage: RewardModel, tally: StageCostTally) -> None:
        model = self._hold_trained(stage.policy, stage.lora, is_reward_model=True)
        held = tally.measure_models(model)
        pairs = self.rows.list_rows(stage.pairs.stage, stage.pairs.of, stage.max_completion_tokens)
        validation = round(stage.validation_share * len(pairs))
        self._add_epochs(stage, tally, model, held, pairs[validation:], predicts=False)
        if stage.head == "fitted":
            tally.add_scoring("fitting the head", model, held, pairs[validation:], predicts=False)
        self._add_saving(stage, tally, model, held)
        saved = self._hold_frozen(stage)
        test = self.rows.list_rows(stage.data, "test", stage.max_completion_tokens)
        with_saved = tally.measure_models(model, saved)
        tally.add_scoring("scoring", saved, with_saved, [*pairs[:validation], *test], predicts=False)

    def _plan_dpo(self, stage: DPO, tally: StageCostTally) -> None:
        policy, reference = self._hold_trained(stage.policy, stage.lora), self._hold_frozen(stage.reference)
        pairs = self.rows.list_rows(stage.pairs.stage, stage.pairs.of, stage.max_completion_tokens)
        held = tally.measure_models(policy)
        is_start = stage.reference == stage.policy
        with_reference = held if is_start else tally.measure_models(policy, reference)
        scored = draw_subset(pairs, CHECKED_PAIRS, COMPARISON_SEED) if _is_sampled_by_reference(stage) else pairs
        before_optimizer = MemoryFootprint(weights=with_reference.weights)
        tally.add_scoring("reference", policy if is_start else reference, before_optimizer, scored)
        self._add_epochs(stage, tally, policy, held, pairs)
        if stage.samplings:
            prompts = [row[0] for row in draw_subset(pairs, PROBED_PROMPTS, COMPARISON_SEED)]
            limit, times = stage.max_completion_tokens, stage.samplings
            tally.add_sampling(policy, held, prompts, k=1, max_tokens=limit, times=times)
        self._add_saving(stage, tally, policy, held)

    def _plan_ppo(self, stage: PPO, tally: StageCostTally) -> None:
        policy, reward = self._hold_trained(stage.policy, stage.lora), self._hold_frozen(stage.reward)
        reference, sft = self._hold_frozen(stage.reference), self._hold_frozen(stage.sft)
        value: ModelInMemory | None = None
        if stage.advantage == "gae" and stage.value_init != "shared":
            start = stage.reward if stage.value_init == "reward" else stage.policy
            value = self._hold_trained(start, stage.lora, is_reward_model=True)
        held = tally.measure_models(policy, reward, reference, sft, value)
        if self.runtime.device == "cpu":
            held += MemoryFootprint(weights=4 * policy.trained_weights)  # the last good policy
        prompts = self.rows.list_prompts(stage.prompts.stage, stage.prompts.of)
        k, limit = stage.completions_per_prompt, stage.max_completion_tokens
        rows: list[BranchLengths] = [(prompt, *[limit] * k) for prompt in prompts]
        iterations = max(1, round(stage.epochs * -(-len(prompts) // stage.batch_size)))
        batch = draw_subset(prompts, stage.batch_size, stage.seed)
        tally.add_sampling(policy, held, batch, k=k, max_tokens=limit, times=iterations)
        tally.add_scoring("scoring", reward, held, rows, times=stage.epochs, predicts=False)
        tally.add_scoring("scoring", reference, held, rows, times=stage.epochs)
        if stage.sft != stage.reference:
            tally.add_scoring("scoring", sft, held, rows, times=stage.epochs)
        minibatch = -(-len(batch) // stage.minibatches)
        options: dict[str, Any] = {"batch_size": minibatch, "seed": stage.seed}
        options["times"] = stage.epochs * stage.epochs_per_batch
        if value is not None:
            tally.add_scoring("scoring", value, held, rows, times=stage.epochs, predicts=False)
            tally.add_updates("value update", value, held, rows, predicts=False, **options)
        tally.add_updates("policy update", policy, held, rows, **options)
        self._add_saving(stage, tally, policy, held)

    def _plan_samples(self, stage: Samples, tally: StageCostTally) -> None:
        policy, reward = self._hold_frozen(stage.policy), self._hold_frozen(stage.reward)
        held = tally.measure_models(policy, reward)
        prompts, limit = self.rows.list_prompts_of(stage), stage.max_completion_tokens
        tally.add_sampling(policy, held, prompts, k=2, max_tokens=limit)
        tally.add_scoring("scoring", reward, held, [(prompt, limit, limit) for prompt in prompts], predicts=False)

    def _plan_evaluation(self, stage: Evaluation, tally: StageCostTally) -> None:
        source = stage.policy.stage if isinstance(stage.policy, Snapshot) else stage.policy
        policy, reward, sft = map(self._hold_frozen, (source, stage.reward, stage.sft))
        prompts, limit = self.rows.list_prompts(stage.data, "test", stage.prompts), stage.max_completion_tokens
        tally.add_sampling(policy, tally.measure_models(policy), prompts, k=stage.best_of, max_tokens=limit)
        sampled: list[BranchLengths] = [(prompt, *[limit] * stage.best_of) for prompt in prompts]
        chosen: list[BranchLengths] = [(prompt, limit) for prompt in prompts]
        tally.add_scoring("scoring", reward, tally.measure_models(policy, reward), sampled, predicts=False)
        if source != stage.sft:
            tally.add_scoring("scoring", sft, tally.measure_models(policy, sft), chosen)
        if stage.second is not None:
            second = self._hold_frozen(stage.second)
            kept = sft if source != stage.sft else None
            tally.add_scoring("scoring", second, tally.measure_models(policy, kept, second), chosen, predicts=False)

    def _plan_gradients(self, stage: Gradients, tally: StageCostTally) -> None:
        policy, reference = self._hold_trained(stage.policy, None), self._hold_frozen(stage.reference)
        pairs = self.rows.list_rows(stage.pairs.stage, stage.pairs.of, stage.max_completion_tokens)
        pairs = draw_subset(pairs, stage.count, COMPARISON_SEED)
        held = MemoryFootprint(weights=tally.measure_models(policy, reference).weights)
        tally.add_scoring("scoring", reference, held, pairs)
        vectors = MemoryFootprint(
            gradients=3 * 4 * policy.shape.weights
        )  # the other side's, and this one's in parts and joined
        sides: list[BranchLengths] = [(row[0], completion) for row in pairs for completion in row[1:]]
        tally.add_updates("gradients", policy, held + vectors, sides, batch_size=1, seed=0, times=1)

    def _add_epochs(
        self,
        stage: SFT | RewardModel | DPO,
        tally: StageCostTally,
        model: ModelInMemory,
        held: MemoryFootprint,
        rows: Sequence[BranchLengths],
        *,
        predicts: bool = True,
    ) -> None:
        """Add the supervised training of a stage."""
        options: dict[str, Any] = {"batch_size": stage.batch_size, "seed": stage.seed, "times": stage.epochs}
        tally.add_updates("training", model, held, rows, predicts=predicts, **options)

    def _add_saving(
        self, stage: TrainedStage, tally: StageCostTally, model: ModelInMemory, held: MemoryFootprint
    ) -> None:
        """Add the copy in the type on disk that is made to save a model that trained whole."""
        stored_bytes = _count_stored_bytes(_find_pretrained(stage), model.shape)
        if model.trains_whole and stored_bytes < 4 and self.runtime.shards == 1:
            tally.add_moment("saving", held, MemoryFootprint(weights=stored_bytes * model.shape.weights))

    def get_shape(self, stage: Stage) -> ModelShape:
        """The shape of a stage's policy. Raises `InputError` if its config can be read nowhere."""
        pretrained = _find_pretrained(stage)
        if pretrained not in self._shapes:
            self._shapes[pretrained] = self._read_shape(pretrained)
        return self._shapes[pretrained]

    def _read_shape(self, stage: Pretrained) -> ModelShape:
        """Read the shape of a pretrained model from its stage's folder, the given config, or its source."""
        path, folder = stage.path, locate_model_folder(self.stage_cache.locate_folder(stage))
        if self.config_path is not None:
            config = read_config_file(self.config_path)
        elif self.stage_cache.is_done(stage):
            config = read_config_file(folder)
        elif stage.local_folder is not None:
            config = read_config_file(stage.local_folder)
        elif path == "world":
            config = make_world_config()
        elif path.startswith("package:"):
            config = read_gguf_config(resolve_package_file(path))
        elif path.endswith(".gguf"):
            config = read_gguf_config(expand_home(path))
        else:
            config = read_hub_config(path, stage.revision)
        return read_model_shape(config, path)

    def _hold_frozen(self, stage: Stage) -> ModelInMemory:
        """The model of a stage, which does not train; adapters stand on the network of their base."""
        root, chain = _list_adapter_chain(stage)
        shape, is_reward_model = self.get_shape(stage), isinstance(stage, RewardModel)
        if not chain:
            return ModelInMemory(shape.as_reward_model() if is_reward_model else shape, root)
        weights = sum(_count_adapters(shape, lora).weights for lora in chain)
        return ModelInMemory(shape, root, stage, weights, is_reward_model=is_reward_model)

    def _hold_trained(self, stage: Stage, lora: LoraSettings | None, *, is_reward_model: bool = False) -> ModelInMemory:
        """A model that starts from a stage's and trains, whole or by adapters."""
        if lora is None:
            shape = self.get_shape(stage)
            return ModelInMemory(shape.as_reward_model() if is_reward_model else shape, None, trains_whole=True)
        start = self._hold_frozen(stage)
        return replace(
            start,
            trained_adapters=_count_adapters(start.shape, lora),
            is_reward_model=is_reward_model and start.shape.head_weights > 0,
        )


def _count_stored_bytes(stage: Pretrained, shape: ModelShape) -> int:
    """Bytes of one of a model's weights on disk."""
    return STORED_BYTES[shape.stored_dtype if stage.dtype == "auto" else stage.dtype]


def _find_pretrained(stage: Stage) -> Pretrained:
    """The pretrained model that a policy or a reward model comes from."""
    while not isinstance(stage, Pretrained):
        stage = _get_start(stage)
    return stage


def _get_start(stage: Stage) -> Stage:
    """The stage whose model a trained stage starts from."""
    inputs = stage.get_input_stages()
    return inputs["base"] if "base" in inputs else inputs["policy"]


def _list_adapter_chain(stage: Stage) -> tuple[Stage, list[LoraSettings]]:
    """The stage with the weights of a model, and the settings of the adapters that later stages trained on them."""
    lora: LoraSettings | None = getattr(stage, "lora", None)
    if lora is None:
        return stage, []
    root, chain = _list_adapter_chain(_get_start(stage))
    return root, [*chain, lora]


def _count_adapters(shape: ModelShape, lora: LoraSettings) -> AdapterSizes:
    """Count the weights of a stage's adapters."""
    matrices = shape.select_matrices(lora.target_modules)
    return AdapterSizes(
        weights=sum(lora.rank * (one.inputs + one.outputs) for one in matrices),
        ranks=lora.rank * len(matrices),
        inputs=sum(one.inputs for one in matrices),
        has_dropout=lora.dropout > 0,
    )


def _is_sampled_by_reference(stage: DPO) -> bool:
    """True if the reference itself sampled the pairs, in the same precision, so that its log-probs are there."""
    source = stage.pairs.stage
    samples = source.samples if isinstance(source, Selection) else source
    quantized = stage.lora is not None and stage.lora.quantize_base  # pairs are sampled from whole weights
    if not isinstance(samples, Samples) or quantized:
        return False
    return samples.policy == stage.reference and samples.precision == stage.precision
