"""Selection: scored pairs split by their gap into easy and hard. Algorithm 1 of the paper."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydantic

from mixpo.algorithms.selection import compute_easy_mask, compute_threshold_for_easy_fraction
from mixpo.data.errors import InputError
from mixpo.settings import Settings
from mixpo.stages.rows import read_table, read_table_metadata, write_table
from mixpo.stages.stage import Part, ScoredPairsStage, Stage
from mixpo.training.job import StageJob


class SelectionSettings(Settings):
    """Settings of the split of pairs into easy and hard: exactly one of the two."""

    threshold: float | None = pydantic.Field(None, ge=0)
    """A pair is easy if its gap is strictly greater (the paper's gamma and theta), in units of the score."""
    easy_fraction: float | None = pydantic.Field(None, gt=0, lt=1)
    """The share of pairs with the largest gaps that is easy."""

    @pydantic.model_validator(mode="after")
    def _check_exactly_one(self) -> "SelectionSettings":
        """Validator: raise `InputError` unless exactly one of threshold and easy_fraction is set."""
        if (self.threshold is None) == (self.easy_fraction is None):
            raise InputError(
                f"selection: found threshold={self.threshold} and easy_fraction={self.easy_fraction}; "
                "expected exactly one of the two; set the other to null"
            )
        return self


class Selection(Stage, SelectionSettings):
    """Stage of scored pairs split by their score gap into `easy.parquet` and `hard.parquet`."""

    parts = ("easy", "hard")
    is_shared = False

    samples: ScoredPairsStage

    @property
    def easy_pairs(self) -> Part:
        """Reference to `easy.parquet`: the pairs whose score gap exceeds the threshold."""
        return Part(stage=self, of="easy")

    @property
    def hard_pairs(self) -> Part:
        """Reference to `hard.parquet`: all other pairs, those of identical completions included."""
        return Part(stage=self, of="hard")

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Split the scored pairs by their gap and write both files. Raises `InputError` if one would be empty."""
        source = input_paths["samples"] / "pairs.parquet"
        rows = read_table(source)
        gaps = np.array([row["gap"] for row in rows], dtype=np.float64)
        if non_finite := np.flatnonzero(~np.isfinite(gaps)).tolist():
            raise InputError(
                f"{source}: row {non_finite[0] + 1} has the gap {gaps[non_finite[0]]} and the scores "
                f"{rows[non_finite[0]]['scores']}; expected finite numbers ({len(non_finite)} of {len(rows)} rows have "
                "none); look at the reward model, then delete this folder and run again"
            )
        threshold = self.threshold
        if threshold is None:
            assert self.easy_fraction is not None
            threshold = compute_threshold_for_easy_fraction(gaps, self.easy_fraction)
        easy = compute_easy_mask(gaps, threshold)
        if easy.all() or not easy.any():
            empty = "hard" if easy.all() else "easy"
            raise InputError(
                f"selection.threshold: {threshold:g} leaves no {empty} pair; the gaps run from {gaps.min():.3g} to "
                f"{gaps.max():.3g} with median {np.median(gaps):.3g}; choose a threshold between, or easy_fraction"
            )
        for name, mask in (("easy", easy), ("hard", ~easy)):
            write_table(
                job.out / f"{name}.parquet",
                [rows[index] for index in np.flatnonzero(mask)],
                **read_table_metadata(source),
            )
        job.finish_stage(threshold=threshold, pairs=len(rows), easy=int(easy.sum()), hard=int((~easy).sum()))
