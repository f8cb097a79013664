"""LabelNoise: human pairs of which a share has its labels flipped, to measure who suffers from noise."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pydantic

from mixpo.data.sources import read_preference_rows, write_rows
from mixpo.settings import Settings
from mixpo.stages.stage import Part, Stage, write_summary
from mixpo.training.record import Cost
from mixpo.training.runtime import Runtime


class LabelNoiseSettings(Settings):
    """How many labels are flipped."""

    share: float = pydantic.Field(0.0, ge=0, le=1)
    """Of the train pairs; test pairs and demonstrations stay as they are."""
    seed: int = pydantic.Field(0, ge=0)
    """At one seed a larger share flips the pairs of a smaller one and more."""


class LabelNoise(Stage, LabelNoiseSettings):
    """Writes `train.parquet`: all pairs in their order, chosen and rejected exchanged in the share that is flipped."""

    parts = ("train",)

    pairs: Part

    @property
    def train_pairs(self) -> Part:
        """The pairs, some of them flipped."""
        return Part(stage=self, of="train")

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Flip."""
        cost, rows = Cost(), read_preference_rows(inputs["pairs"])
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        flipped = set(order[: round(self.share * len(rows))])
        write_rows(
            out / "train.parquet",
            [
                replace(row, chosen=row.rejected, rejected=row.chosen) if place in flipped else row
                for place, row in enumerate(rows)
            ],
        )
        write_summary(out, cost, pairs=len(rows), flipped=len(flipped))
