"""Selection: scored pairs split by their gap into easy and hard. Algorithm 1 of the paper."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydantic

from mixpo.algorithms.selection import easy_mask, order_by_score, score_gaps, threshold_for_easy_fraction
from mixpo.data.errors import InputError
from mixpo.settings import Settings
from mixpo.stages.rows import read_sampler, read_table, write_table
from mixpo.stages.stage import Part, Stage, finish
from mixpo.training.record import Cost
from mixpo.training.runtime import Runtime


class SelectionSettings(Settings):
    """Where to split: exactly one of the two."""

    threshold: float | None = pydantic.Field(None, ge=0)
    """A pair is easy if its gap is strictly greater (the paper's gamma and theta), in units of the score."""
    easy_fraction: float | None = pydantic.Field(None, gt=0, lt=1)
    """The share of pairs with the largest gaps that is easy."""

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> "SelectionSettings":
        if (self.threshold is None) == (self.easy_fraction is None):
            raise InputError(
                f"selection: found threshold={self.threshold} and easy_fraction={self.easy_fraction}; "
                "expected exactly one of the two; set the other to null"
            )
        return self


class Selection(Stage, SelectionSettings):
    """Writes `easy.parquet`, `hard.parquet` and `all.parquet`: scored pairs, the higher score first (chosen)."""

    samples: Stage

    @property
    def easy(self) -> Part:
        """Pairs whose gap exceeds the threshold."""
        return Part(stage=self, of="easy")

    @property
    def hard(self) -> Part:
        """All other pairs, identical completions among them."""
        return Part(stage=self, of="hard")

    @property
    def all(self) -> Part:
        """Easy and hard together."""
        return Part(stage=self, of="all")

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Order and split."""
        cost = Cost()
        source = inputs["samples"] / "samples.parquet"
        rows = read_table(source)
        found = np.array([row["scores"] for row in rows], dtype=np.float64)
        same = np.array([row["tokens"][0] == row["tokens"][1] for row in rows])
        gaps = np.where(same, 0.0, score_gaps(found))
        threshold = self.threshold
        if threshold is None:
            assert self.easy_fraction is not None
            threshold = threshold_for_easy_fraction(gaps, self.easy_fraction)
        easy = easy_mask(gaps, threshold)
        if easy.all() or not easy.any():
            empty = "hard" if easy.all() else "easy"
            raise InputError(
                f"selection.threshold: {threshold:g} leaves no {empty} pair; the gaps run from {gaps.min():.3g} to "
                f"{gaps.max():.3g} with median {np.median(gaps):.3g}; choose a threshold between, or easy_fraction"
            )
        ordered = []
        for row, gap, order in zip(rows, gaps.tolist(), order_by_score(found).tolist(), strict=True):
            pair = {
                name: [row[name][place] for place in order] for name in ("completions", "tokens", "logprobs", "scores")
            }
            ordered.append({"prompt": row["prompt"], "gap": gap, **pair})
        sampler = read_sampler(source)
        for name, mask in (("easy", easy), ("hard", ~easy), ("all", np.ones_like(easy))):
            write_table(out / f"{name}.parquet", [ordered[place] for place in np.flatnonzero(mask)], sampler=sampler)
        finish(
            out,
            cost,
            threshold=threshold,
            pairs=len(rows),
            easy=int(easy.sum()),
            hard=int((~easy).sum()),
            identical=int(same.sum()),
            gap_mean=float(gaps.mean()),
            gap_median=float(np.median(gaps)),
            gap_under_1=float((gaps < 1).mean()),
            score_std=float(found.std()),
        )
