"""Rows as the stages read them: tokens of preference rows, of scored pairs, and of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt
from mixpo.data.tokens import prompt_tokens, tokenize_row
from mixpo.models.language_model import LanguageModel, Precision

SAMPLER = b"mixpo.sampler"
"""Key of the Parquet metadata that names who drew the completions."""


class _HasPrompt(Protocol):
    @property
    def prompt(self) -> Prompt: ...


@dataclass(frozen=True)
class Pairs:
    """Preference pairs in tokens: completions[i] = [chosen, rejected]."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    sampler: str | None
    """`sampler_name` of the model that drew the completions; None for human pairs."""
    logprobs: list[list[float]] | None
    """The sampler's own sequence log-probs of both, kept from sampling."""


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
    """Write rows as Parquet, with the `sampler_name` if they were sampled."""
    table = pa.Table.from_pylist(list(rows))
    if sampler is not None:
        table = table.replace_schema_metadata({SAMPLER: sampler})
    pq.write_table(table, path)


def sampler_name(digest: str, precision: Precision) -> str:
    """Who drew completions: log-probs kept from sampling are those of this model in this precision."""
    return f"{digest} {precision}"


def read_sampler(path: Path) -> str | None:
    """The `sampler_name` of the model that drew a file's completions."""
    metadata = pq.read_schema(path).metadata or {}
    return metadata[SAMPLER].decode() if SAMPLER in metadata else None


def read_pairs(path: Path, lm: LanguageModel, *, max_completion_tokens: int) -> Pairs:
    """Pairs from preference rows (`prompt`, `chosen`, `rejected`) or from scored pairs (`completions`, ...).

    Sampled completions are taken token by token as they were drawn; the model must share the sampler's tokenizer, as
    every model that was trained from it does.
    """
    rows = read_table(path)
    if rows and "tokens" in rows[0]:
        return Pairs(
            [prompt_tokens(lm.tokenizer, row["prompt"]) for row in rows],
            [row["tokens"] for row in rows],
            read_sampler(path),
            [[sum(logprobs) for logprobs in row["logprobs"]] for row in rows],
        )
    tokens = [
        tokenize_row(lm.tokenizer, row["prompt"], [row["chosen"], row["rejected"]], limit=max_completion_tokens)
        for row in rows
    ]
    return Pairs([prompt for prompt, _ in tokens], [completions for _, completions in tokens], None, None)


def unique_prompts(rows: Sequence[dict[str, Any]], limit: int | None = None) -> list[Prompt]:
    """The different prompts of rows, in order, the first `limit` of them."""
    seen: dict[str, Prompt] = {}
    for row in rows:
        seen.setdefault(str(row["prompt"]), row["prompt"])
        if limit is not None and len(seen) == limit:
            break
    return list(seen.values())
