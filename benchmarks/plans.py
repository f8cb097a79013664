"""What the memory plan says of a workload, to stand beside its measured peak."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.ours import SAMPLED_TOKENS, build_stage
from benchmarks.workloads import Workload
from mixpo.data.branches import BranchLengths
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.experiments.row_lengths import RowLengthEstimator
from mixpo.experiments.stage_costs import CostPlanner, StageCostTally
from mixpo.models.network import Precision
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.rows import read_row_lengths
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache
from mixpo.training.footprint import MemoryFootprint, ModelInMemory, PlannedRuntime, count_cache_bytes, measure_process
from mixpo.training.rates import CARDS
from mixpo.training.runtime import Runtime, find_device_kind


class WorkloadRowLengths(RowLengthEstimator):
    """Token counts of a workload's rows, which were written beforehand."""

    def __init__(self, stage_cache: StageCache, folder: Path) -> None:
        super().__init__(stage_cache)
        self.folder = folder

    def list_rows(self, stage: Stage, part: str, max_completion_tokens: int) -> list[BranchLengths]:
        """Tokens of the prompt and the completions of every row."""
        rows = read_row_lengths(self.folder / f"{part}.parquet")
        return [(row[0], *(min(tokens, max_completion_tokens) for tokens in row[1:])) for row in rows]

    def list_prompts(self, stage: Stage, part: str, limit: int | None = None) -> list[int]:
        """Tokens of every different prompt."""
        rows = read_row_lengths(self.folder / f"{part}.parquet", unique_prompts=True)
        return [row[0] for row in draw_subset(rows, limit, COMPARISON_SEED)]


class ChainPlanner:
    """Plans the memory of workloads that start from each other, as MPO's stages do, on this machine's device."""

    def __init__(self, inputs: Path, model: str) -> None:
        self.inputs = inputs
        self.stage_cache = StageCache(inputs / "cache", Runtime())
        path = inputs / "models" / model / "model"
        self.base = Pretrained(path=str(path), content="not read")  # else all weights are hashed
        self.stages: dict[str, Any] = {}
        """The stages of the workloads before, by kind."""

    def plan(self, workload: Workload) -> dict[str, Any]:
        """GB of a workload's fullest moment, and what that is; it starts from the last policy before it.

        On a GPU without what the process takes beside tensors, which the measured peak leaves out too.
        """
        spec, settings = workload.spec(str(self.inputs)), Runtime(**workload.runtime)
        runtime = PlannedRuntime(
            device=find_device_kind(),
            microbatch_tokens=settings.microbatch_tokens,
            sampling_bytes=settings.sampling_bytes,
            activation_checkpointing=settings.activation_checkpointing,
        )
        planner = CostPlanner(self.stage_cache, runtime, lambda precision: CARDS["h100"])
        planner.rows = WorkloadRowLengths(self.stage_cache, self.inputs / "rows" / workload.name)
        if workload.kind == "sampling":
            moment, footprint = "sampling", self._plan_sampling(workload, planner, runtime)
        else:
            policy = self.stages.get("dpo" if workload.kind == "ppo" else "sft", self.base)
            stage = build_stage(spec, policy, sft=self.stages.get("sft"), reward=self.stages.get("reward"))
            self.stages[workload.kind] = stage
            cost = planner.plan_stage(stage)
            assert cost is not None
            moment, footprint = cost.moment, cost.footprint
        if runtime.device == "cuda":
            footprint = replace(footprint, process=0)
        return {"planned GB": footprint.total / 1e9, "planned moment": moment}

    def _plan_sampling(self, workload: Workload, planner: CostPlanner, runtime: PlannedRuntime) -> MemoryFootprint:
        """Footprint of sampling from the base model, all prompts at once."""
        shape, precision = planner.get_shape(self.base), cast(Precision, workload.precision)
        runtime = replace(runtime, sampling_bytes=SAMPLED_TOKENS * count_cache_bytes(shape, precision))
        tally = StageCostTally(precision, runtime, CARDS["h100"])
        model, prompts = ModelInMemory(shape, "base"), planner.rows.list_prompts(self.base, "pairs")
        tally.add_sampling(model, tally.measure_models(model), prompts, k=1, max_tokens=workload.new_tokens)
        return tally.moments["sampling"] + measure_process(precision, runtime)
