"""Base classes of stages: a stage has settings and input stages as fields, and computes a folder from both."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pydantic

from mixpo.data.errors import InputError
from mixpo.settings import Settings
from mixpo.stages.identity import IdentifiedModel
from mixpo.training.job import StageJob
from mixpo.training.runtime import Runtime


class Stage(IdentifiedModel):
    """A node of an experiment's graph: settings and input stages, from which it computes a folder; equal ones once.

    Its identity is its settings, the identities of its input stages and the content of the data it reads. `compute`
    reads the folders of the input stages and writes its own. A folder with `summary.json`, written last, is complete.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the files of rows that other stages can read (`Part`)."""
    splits_over_processes: ClassVar[bool] = True
    """Whether several processes compute it together; if not, as where no model computes, the main one alone."""
    cuts_weights: ClassVar[bool] = True
    """Whether `runtime.sharded` cuts the weights of its models over the processes; if not, each holds whole ones."""
    shares_equal_reference: ClassVar[bool] = False
    """Whether, where all weights train, a reference equal to the policy is that policy before its first step."""

    def get_input_stages(self) -> dict[str, "Stage"]:
        """Input stages by the names of their fields."""
        return {name: part if isinstance(part, Stage) else part.stage for name, part in self._iterate_inputs()}

    def locate_inputs(self, stage_folders: Mapping[str, Path]) -> dict[str, Path]:
        """Paths of the inputs by field: a stage's folder, or the path of a part or snapshot in its stage's folder."""
        return {
            name: stage_folders[name] if isinstance(part, Stage) else part.get_path_within(stage_folders[name])
            for name, part in self._iterate_inputs()
        }

    def _iterate_inputs(self) -> Iterator[tuple[str, "Stage | Part | Snapshot"]]:
        """Yield (name, value) of each field that is a stage, or a part or snapshot of a stage."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Stage | Part | Snapshot):
                yield name, value

    def select_runtime(self, runtime: Runtime) -> Runtime:
        """The runtime settings of this stage: those given, not `sharded` if every process must hold whole weights."""
        return runtime if self.cuts_weights else runtime.model_copy(update={"sharded": False})

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Compute the stage from the files at `input_paths`, write the job's folder, and finish the job."""
        raise NotImplementedError


class PolicyStage(Stage):
    """A stage whose folder holds a policy: `model/` is a causal language model."""


class RewardStage(Stage):
    """A stage whose folder holds a reward model: `model/` is a sequence classifier with one label."""


class DataStage(Stage):
    """A stage whose folder holds the rows of a data set: demonstrations, train and test pairs."""


class ScoredPairsStage(Stage):
    """A stage whose folder holds sampled pairs with their scores in `pairs.parquet`."""


class Part(Settings):
    """A reference to one file of rows of a stage, such as `Selection(...).easy_pairs` or `Data(...).train_pairs`."""

    stage: Stage
    of: str

    @pydantic.model_validator(mode="after")
    def _check_part_exists(self) -> "Part":
        """Validator: raise `InputError` if the stage has no file of this name."""
        if self.of not in self.stage.parts:
            expected = " or ".join(self.stage.parts) or "a stage that has parts"
            raise InputError(f"{type(self.stage).__name__}: found no part {self.of!r}; expected {expected}")
        return self

    def get_path_within(self, stage_folder: Path) -> Path:
        """Path of the file of rows in its stage's folder."""
        return stage_folder / f"{self.of}.parquet"


class Snapshot(Settings):
    """A reference to a policy saved during training: `PPO(..., snapshots=3)` saves numbers 1, 2 and 3."""

    stage: PolicyStage
    number: int

    def get_path_within(self, stage_folder: Path) -> Path:
        """Path of the snapshot's folder, which has `model/`, in its stage's folder."""
        return stage_folder / "snapshots" / str(self.number)
