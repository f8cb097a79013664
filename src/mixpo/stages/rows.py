"""Reading and writing of stages' rows: Parquet tables, tokenized pairs and unique prompts."""

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
from mixpo.training.record import progress_listener

SAMPLER = b"mixpo.sampler"
"""Key of the Parquet metadata that names the model that sampled the completions."""


@dataclass(frozen=True)
class Pairs:
    """Tokenized preference pairs: completions[i] = [chosen, rejected]."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    sampler: str | None
    """`format_sampler_name` of the model that sampled the completions; None for human pairs."""
    logprobs: list[list[float]] | None
    """Sequence log-probs of both from sampling; None for human pairs."""
    prompt_texts: list[Prompt]
    """Prompts as text or messages."""
    truncated: int
    """Completions of all rows that were cut to max_completion_tokens."""
    identical: int
    """Rows without a difference in tokens, which are left out."""


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a Parquet file that a stage wrote. Raises `InputError` if it is damaged."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: found no readable rows ({str(error).splitlines()[0]}); expected those that the stage wrote; "
            "delete the stage's folder and run again"
        ) from error
    return rows


def write_table(path: Path, rows: Sequence[dict[str, Any]], *, sampler: str | None = None) -> None:
    """Write rows to a Parquet file, with their `format_sampler_name` if they were sampled."""
    table = pa.Table.from_pylist(list(rows))
    if sampler is not None:
        table = table.replace_schema_metadata({SAMPLER: sampler})
    pq.write_table(table, path)


def format_sampler_name(digest: str, precision: Precision) -> str:
    """Name the model and precision that completions and their log-probs are sampled with."""
    return f"{digest} {precision}"


def read_sampler_name(path: Path) -> str | None:
    """Read the `format_sampler_name` of a file's completions; None for human pairs."""
    metadata = pq.read_schema(path).metadata or {}
    return metadata[SAMPLER].decode() if SAMPLER in metadata else None


def read_pairs(path: Path, lm: LanguageModel, *, max_completion_tokens: int) -> Pairs:
    """Read and tokenize preference rows (`prompt`, `chosen`, `rejected`) or scored pairs (`completions`, ...).

    Sampled completions keep their tokens; the model must have the sampler's tokenizer, as every model trained from it
    has. Raises `InputError` if the completions of all pairs are identical.
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
    different = [row for row, (_, (chosen, rejected)) in enumerate(tokens) if chosen != rejected]
    if rows and not different:
        cut = f"cut to max_completion_tokens {max_completion_tokens}, " if truncated else ""
        raise InputError(
            f"{path}: found {len(rows)} pairs, {cut}each of two identical completions; expected one with a difference "
            f"to learn from; {'raise max_completion_tokens' if truncated else 'look at the rows'}"
        )
    report_truncation(path.stem, truncated, 2 * len(rows), max_completion_tokens)
    if identical := len(rows) - len(different):
        progress_listener.get().on_message(
            f"{path.stem}: {identical} of {len(rows)} pairs left out: both completions are the same"
        )
    return Pairs(
        [tokens[row][0] for row in different],
        [tokens[row][1] for row in different],
        read_sampler_name(path),
        [logprobs[row] for row in different] if logprobs else None,
        [rows[row]["prompt"] for row in different],
        truncated,
        identical,
    )


def report_truncation(name: str, truncated: int, total: int, limit: int) -> None:
    """Report the number of cut completions to the listener, if there are any."""
    if truncated:
        progress_listener.get().on_message(
            f"{name}: {truncated} of {total} completions ({truncated / total:.0%}) are cut to max_completion_tokens "
            f"{limit} and have no end token"
        )


def select_unique_prompts(rows: Sequence[dict[str, Any]], count: int | None = None) -> list[Prompt]:
    """Select the unique prompts of rows in order, or `count` of them, the same ones at every seed."""
    different = {prompt_key(row["prompt"]): row["prompt"] for row in rows}
    return draw_subset(list(different.values()), count, COMPARISON_SEED)
