"""Rows as the stages read them: tokens of preference rows, of scored pairs, and of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt, prompt_key
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.tokens import tokenize_prompt, tokenize_row
from mixpo.models.language_model import LanguageModel, Precision
from mixpo.training.record import watcher

SAMPLER = b"mixpo.sampler"
"""Key of the Parquet metadata that names who drew the completions."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs in tokens: completions[i] = [chosen, rejected]."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    sampler: str | None
    """`name_sampler` of the model that drew the completions; None for human pairs."""
    logprobs: list[list[float]] | None
    """The sampler's own sequence log-probs of both, kept from sampling."""
    untokenised: list[Prompt]
    """The prompts as the rows have them."""
    truncated: int
    """Completions that were cut to max_completion_tokens, among those of all rows."""
    identical: int
    """Rows left out, both of whose completions are the same tokens: no loss on pairs can learn from them."""


def read_table(path: Path) -> list[dict[str, Any]]:
    """All rows of a Parquet file that a stage wrote. Raises `InputError` if it is damaged."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: found no readable rows ({str(error).splitlines()[0]}); expected those that the stage wrote; "
            "delete the stage's folder and run again"
        ) from error
    return rows


def write_table(path: Path, rows: Sequence[dict[str, Any]], *, sampler: str | None = None) -> None:
    """Write rows as Parquet, with the `name_sampler` if they were sampled."""
    table = pa.Table.from_pylist(list(rows))
    if sampler is not None:
        table = table.replace_schema_metadata({SAMPLER: sampler})
    pq.write_table(table, path)


def name_sampler(digest: str, precision: Precision) -> str:
    """Who drew completions: log-probs kept from sampling are those of this model in this precision."""
    return f"{digest} {precision}"


def read_sampler(path: Path) -> str | None:
    """The `name_sampler` of the model that drew a file's completions."""
    metadata = pq.read_schema(path).metadata or {}
    return metadata[SAMPLER].decode() if SAMPLER in metadata else None


def read_pairs(path: Path, lm: LanguageModel, *, max_completion_tokens: int) -> Pairs:
    """Pairs from preference rows (`prompt`, `chosen`, `rejected`) or from scored pairs (`completions`, ...).

    Sampled completions are taken token by token as they were drawn; the model must share the sampler's tokenizer, as
    every model that was trained from it does. Raises `InputError` if all pairs are left out as identical.
    """
    rows = read_table(path)
    if rows and "tokens" in rows[0]:
        tokens = [(tokenize_prompt(lm.tokenizer, row["prompt"]), row["tokens"]) for row in rows]
        logprobs = [[sum(branch) for branch in row["logprobs"]] for row in rows]
        truncated = 0
    else:
        tokens = [
            tokenize_row(lm.tokenizer, row["prompt"], [row["chosen"], row["rejected"]], limit=max_completion_tokens)
            for row in rows
        ]
        logprobs = []
        truncated = sum(not lm.has_ended(side) for _, sides in tokens for side in sides)
    different = [place for place, (_, (chosen, rejected)) in enumerate(tokens) if chosen != rejected]
    if rows and not different:
        cut = f"cut to max_completion_tokens {max_completion_tokens}, " if truncated else ""
        raise InputError(
            f"{path}: found {len(rows)} pairs, {cut}each of two identical completions; expected one with a difference "
            f"to learn from; {'raise max_completion_tokens' if truncated else 'look at the rows'}"
        )
    report_truncation(path.stem, truncated, 2 * len(rows), max_completion_tokens)
    if identical := len(rows) - len(different):
        watcher.get().note(f"{path.stem}: {identical} of {len(rows)} pairs left out: both completions are the same")
    return Pairs(
        [tokens[place][0] for place in different],
        [tokens[place][1] for place in different],
        read_sampler(path),
        [logprobs[place] for place in different] if logprobs else None,
        [rows[place]["prompt"] for place in different],
        truncated,
        identical,
    )


def report_truncation(name: str, truncated: int, total: int, limit: int) -> None:
    """Tell the watcher how many completions were cut, if any were."""
    if truncated:
        watcher.get().note(
            f"{name}: {truncated} of {total} completions ({truncated / total:.0%}) are cut to max_completion_tokens "
            f"{limit} and have no end token"
        )


def select_unique_prompts(rows: Sequence[dict[str, Any]], count: int | None = None) -> list[Prompt]:
    """The different prompts of rows, in order; `count` of them, the same ones whatever a stage's seed is."""
    different = {prompt_key(row["prompt"]): row["prompt"] for row in rows}
    return draw_subset(list(different.values()), count, COMPARISON_SEED)
