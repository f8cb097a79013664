"""Reading and writing of stages' rows: Parquet tables, tokenized pairs and unique prompts."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt, make_prompt_key
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.tokens import compute_tokenization_digest, tokenize_row
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Precision
from mixpo.models.samplers import SamplerName
from mixpo.training.record import progress_listener


@dataclass(frozen=True)
class TokenizedPairs:
    """Preference pairs in tokens: completions[i] = [chosen, rejected] of the prompt i."""

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


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a stage's Parquet file as dicts, with all or some columns. Raises `InputError` if it is damaged."""
    with explain_reading_errors(path):
        rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    return rows


@contextmanager
def explain_reading_errors(path: Path) -> Iterator[None]:
    """Context manager: raise `InputError` in place of errors of reading a stage's Parquet file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: found no readable rows ({str(error).splitlines()[0]}); expected those that the stage wrote; "
            "delete the stage's folder and run again"
        ) from error


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], **metadata: str | None) -> None:
    """Write rows to a Parquet file, with metadata such as the `sampler` of their completions; None is left out."""
    entries = {f"mixpo.{name}": value for name, value in metadata.items() if value is not None}
    pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata(entries), path)


def read_row_lengths(path: Path, *, unique_prompts: bool = False) -> list[tuple[int, ...]]:
    """Token counts of each row's prompt and completions in a file, or of each different prompt alone; no token is read.

    Raises `InputError` if the file is damaged or has no tokens.
    """
    with explain_reading_errors(path):
        table = pq.read_table(path, columns=["prompt", "prompt_tokens"] + ([] if unique_prompts else ["tokens"]))
        prompts = pc.list_value_length(table["prompt_tokens"]).to_pylist()
        if unique_prompts:
            keys = map(make_prompt_key, table["prompt"].to_pylist())
            return [(length,) for length in dict(zip(keys, prompts, strict=True)).values()]
        lengths = iter(pc.list_value_length(pc.list_flatten(table["tokens"])).to_pylist())
        counts = pc.list_value_length(table["tokens"]).to_pylist()
        return [(prompt, *itertools.islice(lengths, count)) for prompt, count in zip(prompts, counts, strict=True)]


def read_table_metadata(path: Path) -> dict[str, str]:
    """The metadata, texts by name, that `write_table` put into a Parquet file; empty if it has none."""
    metadata = pq.read_schema(path).metadata or {}
    entries = {name.decode(): value.decode() for name, value in metadata.items()}
    return {name[6:]: value for name, value in entries.items() if name.startswith("mixpo.")}


def format_sampler_name(model_digest: str, precision: Precision, sampler: SamplerName = "local") -> str:
    """Name, as text, of the model, precision and engine by which completions and their log-probs are sampled."""
    return " ".join([model_digest, precision, *([] if sampler == "local" else [sampler])])


def add_token_columns(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Copies of rows of text with `prompt_tokens`, and the `tokens` of all completions (chosen before rejected)."""
    names = [name for name in ("completion", "chosen", "rejected") if rows and name in rows[0]]
    tokens = (tokenize_row(tokenizer, row["prompt"], [row[name] for name in names]) for row in rows)
    return [
        {**row, "prompt_tokens": prompt, "tokens": completions}
        for row, (prompt, completions) in zip(rows, tokens, strict=True)
    ]


def read_tokenized_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows of a file with token columns, made again for another tokenizer: `InputError` then if they were sampled."""
    rows, metadata = read_table(path), read_table_metadata(path)
    if metadata.get("tokenizer") == compute_tokenization_digest(tokenizer):
        if any(row.get(name) is None for row in rows for name in ("prompt_tokens", "tokens")):
            raise InputError(
                f"{path}: found rows without tokens; expected those that the stage wrote; delete the stage's folder "
                "and run again"
            )
        return rows
    if "sampler" in metadata:
        raise InputError(
            f"{path}: found completions that were sampled with another tokenizer than the model's; expected the same; "
            "sample them from a policy of the same family"
        )
    return add_token_columns(rows, tokenizer)


def read_unique_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_prompts: int | None = None
) -> tuple[list[Prompt], list[list[int]]]:
    """(prompts, their token ids) of a file, each once, in order; a fixed random subset if `max_prompts` is smaller."""
    rows = read_table(path, ["prompt", "prompt_tokens"])
    unique = draw_subset(
        list({make_prompt_key(row["prompt"]): row for row in rows}.values()), max_prompts, COMPARISON_SEED
    )
    if read_table_metadata(path).get("tokenizer") != compute_tokenization_digest(tokenizer):
        unique = add_token_columns(unique, tokenizer)
    return [row["prompt"] for row in unique], [row["prompt_tokens"] for row in unique]


def read_pairs(path: Path, lm: LanguageModel, *, max_completion_tokens: int) -> TokenizedPairs:
    """Read tokenized pairs that differ, human ones cut to a length. Raises `InputError` if none differs."""
    rows, sampler = read_tokenized_rows(path, lm.tokenizer), read_table_metadata(path).get("sampler")
    limit = None if sampler else max_completion_tokens
    completions = [[side[:limit] for side in row["tokens"]] for row in rows]
    truncated = 0 if sampler else sum(not lm.has_ended(side) for sides in completions for side in sides)
    different = [row for row, (chosen, rejected) in enumerate(completions) if chosen != rejected]
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
    return TokenizedPairs(
        [rows[row]["prompt_tokens"] for row in different],
        [completions[row] for row in different],
        sampler,
        [[sum(branch) for branch in rows[row]["logprobs"]] for row in different] if sampler else None,
        [rows[row]["prompt"] for row in different],
        truncated,
        identical,
    )


def report_truncation(rows_name: str, truncated: int, completion_count: int, max_tokens: int) -> None:
    """Send the number of cut completions to the progress listener, if there are any."""
    if truncated:
        progress_listener.get().on_message(
            f"{rows_name}: {truncated} of {completion_count} completions ({truncated / completion_count:.0%}) are cut "
            f"to max_completion_tokens {max_tokens} and have no end token"
        )
