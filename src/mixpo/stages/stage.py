"""What a stage is: a config whose fields name the stages it reads, and a pure function from both to a folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from mixpo.data.errors import InputError
from mixpo.models.language_model import Precision
from mixpo.settings import Settings
from mixpo.stages.identity import Identified
from mixpo.training.record import Cost, write_json
from mixpo.training.runtime import Runtime

SUMMARY = "summary.json"


class Stage(Identified):
    """A node of an experiment. Equal stages are one stage.

    Its identity is its settings, its upstream stages' identities and the content of the data it reads. `work` reads
    the upstream stages' folders and writes its own; `summary.json`, written last, says that it is complete.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the files of rows that other stages may read (`Part`)."""

    def inputs(self) -> dict[str, "Stage"]:
        """The upstream stages by the name of the field that holds them."""
        return {name: part if isinstance(part, Stage) else part.stage for name, part in self._upstream()}

    def paths(self, folders: Mapping[str, Path]) -> dict[str, Path]:
        """What each upstream field stands for on disk: the stage's folder, or one part or snapshot of it."""
        return {
            name: folders[name] if isinstance(part, Stage) else part.path_in(folders[name])
            for name, part in self._upstream()
        }

    def _upstream(self) -> Iterator[tuple[str, "Stage | Part | Snapshot"]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Stage | Part | Snapshot):
                yield name, value

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Read `inputs` (what `paths` returns) and fill the folder `out`."""
        raise NotImplementedError


class PolicyStage(Stage):
    """A stage that offers a policy: `model/` in its folder is a causal language model."""


class RewardStage(Stage):
    """A stage that offers a reward model: `model/` in its folder is a sequence classifier with one label."""


class DataStage(Stage):
    """A stage that offers the rows of a data set: demonstrations, train and test pairs."""


class ScoredPairsStage(Stage):
    """A stage that offers sampled pairs with their scores: `pairs.parquet` in its folder."""


class Part(Settings):
    """One file of rows of a stage, which hold prompts and pairs: `Selection(...).easy`, `Data(...).train_pairs`."""

    stage: Stage
    of: str

    @pydantic.model_validator(mode="after")
    def _check_name(self) -> "Part":
        if self.of not in self.stage.parts:
            expected = " or ".join(self.stage.parts) or "a stage that has parts"
            raise InputError(f"{type(self.stage).__name__}: found no part {self.of!r}; expected {expected}")
        return self

    def path_in(self, folder: Path) -> Path:
        """The file in the stage's folder."""
        return folder / f"{self.of}.parquet"


class Snapshot(Settings):
    """A policy on the way of a stage that keeps some: `PPO(..., snapshots=3)` keeps numbers 1, 2 and 3."""

    stage: PolicyStage
    number: int

    def path_in(self, folder: Path) -> Path:
        """The folder in the stage's folder that holds `model/`."""
        return folder / "snapshots" / str(self.number)


class SeededSettings(Settings):
    """Settings of every stage that draws random numbers and computes with a model."""

    seed: int = pydantic.Field(0, ge=0)
    precision: Precision = "float32"
    """`bfloat16` runs matrix products in bfloat16 (autocast), weights and optimizer stay in float32."""


def write_summary(out: Path, cost: Cost, **figures: Any) -> None:
    """Write `summary.json`: the final figures and the cost."""
    write_json(out / SUMMARY, {**figures, "cost": cost.summary()})


def model_folder(folder: Path) -> Path:
    """The model folder inside a stage's folder."""
    return folder / "model"
