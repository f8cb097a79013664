"""Token counts of the rows that stages will read: those of cached stages, else the largest that settings allow."""

from pathlib import Path

from mixpo.data.branches import BranchLengths
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.stages.data import Data
from mixpo.stages.label_noise import LabelNoise
from mixpo.stages.rows import read_row_lengths
from mixpo.stages.samples import Samples
from mixpo.stages.selection import Selection
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache

ASSUMED_ROWS = {"train": 100_000, "test": 5_000}
"""Rows of sources that were not read, where no setting bounds them."""


class RowLengthEstimator:
    """Finds the token counts of stages' rows, and remembers in `assumptions` what it had to assume."""

    def __init__(self, stage_cache: StageCache) -> None:
        self.stage_cache = stage_cache
        self.assumptions: dict[str, None] = {}
        """Lines of text, each once."""
        self._read: dict[tuple[Path, bool], list[BranchLengths]] = {}

    def list_rows(self, stage: Stage, part: str, max_completion_tokens: int) -> list[BranchLengths]:
        """Tokens of the prompt and the completions of every row of a stage's part, human ones cut to a length."""
        match stage:
            case LabelNoise():
                return self.list_rows(stage.pairs.stage, stage.pairs.of, max_completion_tokens)
            case Data():
                read = self._read_part(stage, part)
                if read is not None:
                    return [(row[0], *(min(tokens, max_completion_tokens) for tokens in row[1:])) for row in read]
                completions = [max_completion_tokens] * (1 if part == "demonstrations" else 2)
                return [(stage.max_prompt_tokens, *completions)] * self._estimate_row_count(stage, part)
            case Selection():
                return self._read_part(stage, part) or self._list_selected_rows(stage, part)
            case Samples():
                read = self._read_part(stage, part)
                sides = [stage.max_completion_tokens] * 2
                return read or [(prompt, *sides) for prompt in self.list_prompts_of(stage)]
        raise NotImplementedError(type(stage))

    def list_prompts(self, stage: Stage, part: str, limit: int | None = None) -> list[int]:
        """Tokens of every different prompt of a stage's part, or of the subset that stages of a limit take."""
        rows = self._read_part(stage, part, unique_prompts=True)
        if rows is None:
            if isinstance(stage, LabelNoise):
                return self.list_prompts(stage.pairs.stage, stage.pairs.of, limit)
            rows = self.list_rows(stage, part, 1)
        return [row[0] for row in draw_subset(rows, limit, COMPARISON_SEED)]

    def list_prompts_of(self, stage: Samples) -> list[int]:
        """Tokens of the prompts that are sampled from."""
        return self.list_prompts(stage.rows.stage, stage.rows.of, stage.prompts)

    def _read_part(self, stage: Stage, part: str, *, unique_prompts: bool = False) -> list[BranchLengths] | None:
        """Read the lengths of a cached stage's part; None if the stage is not cached."""
        if not self.stage_cache.is_done(stage):
            return None
        path = self.stage_cache.locate_folder(stage) / f"{part}.parquet"
        if (path, unique_prompts) not in self._read:
            self._read[path, unique_prompts] = read_row_lengths(path, unique_prompts=unique_prompts)
        return self._read[path, unique_prompts]

    def _list_selected_rows(self, stage: Selection, part: str) -> list[BranchLengths]:
        """Some of the sampled rows: the share that the settings say, or half if only the gaps decide."""
        rows = self.list_rows(stage.samples, "pairs", 0)
        easy = stage.easy_fraction
        if easy is None:
            easy = 0.5
            self.assumptions["half of the sampled pairs are easy, since the gaps are not known yet"] = None
        share = easy if part == "easy" else 1 - easy
        return draw_subset(rows, max(1, round(share * len(rows))), COMPARISON_SEED)

    def _estimate_row_count(self, data: Data, part: str) -> int:
        """Number of rows of a data stage's part that was not read."""
        self.assumptions[
            "rows are not read yet: every prompt and completion is planned at the longest that the settings allow"
        ] = None
        train = data.train_rows or self._assume_row_count("train")
        test = round(data.test_share * train) if not data.test and data.format != "world" else None
        test = data.test_rows or test or (self._assume_row_count("test") if part == "test" else 0)
        own = None if data.demonstrations else train
        counts = {"train": train, "test": test, "second": data.second_rows}
        counts["demonstrations"] = data.demonstration_rows or own or self._assume_row_count("train")
        return counts[part]

    def _assume_row_count(self, part: str) -> int:
        """The number of rows that is assumed for a part that no setting bounds."""
        text = f"data.{part}_rows is not set: planned for {ASSUMED_ROWS[part]:,} rows"
        self.assumptions[text] = None
        return ASSUMED_ROWS[part]
