"""LabelNoise: human pairs with a share of flipped labels, to measure robustness to noise."""

import random
from collections.abc import Mapping
from pathlib import Path

import pydantic

from mixpo.settings import Settings
from mixpo.stages.rows import read_table, read_table_metadata, write_table
from mixpo.stages.stage import Part, Stage
from mixpo.training.job import StageJob


class LabelNoiseSettings(Settings):
    """Share of the train pairs whose labels are flipped, and the seed that chooses them."""

    share: float = pydantic.Field(0.0, ge=0, le=1)
    """Share of the train pairs that are flipped; test pairs and demonstrations do not change."""
    seed: int = pydantic.Field(0, ge=0)
    """At the same seed, a larger share flips all pairs of a smaller one."""


class LabelNoise(Stage, LabelNoiseSettings):
    """Stage that copies pairs into `train.parquet`, its only file, with a random share of the labels flipped."""

    parts = ("train",)
    is_shared = False

    pairs: Part

    @property
    def train_pairs(self) -> Part:
        """Reference to `train.parquet`: all pairs, a share of them flipped."""
        return Part(stage=self, of="train")

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Flip the labels of a share of the pairs and write `train.parquet`."""
        rows = read_table(input_paths["pairs"])
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        flipped = set(order[: round(self.share * len(rows))])
        for index in flipped:
            row = rows[index]
            row.update(chosen=row["rejected"], rejected=row["chosen"], tokens=row["tokens"][::-1])
        write_table(job.out / "train.parquet", rows, **read_table_metadata(input_paths["pairs"]))
        job.finish_stage(pairs=len(rows), flipped=len(flipped))
