"""Preview of the rows of a recipe before training: a row of each kind in tokens, counts, and problems."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.rows import BadRow, Demonstration, Preference, Prompt, RowError, raise_for_bad_rows
from mixpo.data.sources import expand_home, guess_format, is_data_file, read_hub_records, read_records
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import find_end_token_id, get_control_token_ids, tokenize_row
from mixpo.experiments.recipe import Recipe, explain_validation_errors, read_recipe
from mixpo.models.folders import load_tokenizer
from mixpo.stages.data import (
    SourceRows,
    SplitRows,
    compute_data_statistics,
    describe_data_statistics,
    explain_summary_errors,
    fill_in_world_row_counts,
    read_source_rows,
    split_hub_name,
    split_source_rows,
)
from mixpo.stages.pretrained import Pretrained, read_pretrained_tokenizer
from mixpo.stages.rows import read_table
from mixpo.stages.stage_cache import read_stage_summary

MAX_TOKENIZED_ROWS = 1000
"""Largest number of rows, drawn at random, whose completions are counted in tokens."""
CONTEXT_TOKENS = 6
"""Number of tokens before a token that are decoded with it."""
END_CHARACTERS = 60
"""Number of characters shown of each end of a text on one line."""


@dataclass(frozen=True)
class TokenText:
    """Text of a token, or of several tokens that share a character."""

    text: str
    """Text in which control characters are escaped."""
    control: bool
    """True for a control token, such as the end token."""


@dataclass(frozen=True)
class TokenizedText:
    """A prompt or a completion in tokens."""

    name: str
    pieces: list[TokenText]
    tokens: int
    trained: bool
    """True if its tokens are in the loss."""
    truncated: bool = False

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class TokenizedExample:
    """A row of data in tokens: its prompt and its completions."""

    kind: str
    texts: list[TokenizedText]


@dataclass
class DataPreview:
    """Content of `mixpo data preview`: examples, counts, facts, warnings and bad rows."""

    examples: list[TokenizedExample]
    tokens: list[str]
    """Lines on the tokens that prompts begin and completions end with."""
    counts: dict[str, str]
    facts: list[str]
    """Lines on the columns that are read, duplicates, contradictions and shared prompts."""
    warnings: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def read_recipe_or_source(source: str, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Read a recipe by its name or file, or make one of a data source as `mixpo run pairs data.train=SOURCE` does.

    The format of a source is guessed from its first row unless an override sets it.
    """
    model_override = [f"model.path={json.dumps(model, ensure_ascii=False)}"] if model else []
    if not (source.startswith("hub:") or is_data_file(source)):
        return read_recipe(source, [*overrides, *model_override])
    names = json.dumps([source], ensure_ascii=False)
    rows = [f"data.train={names}"]
    if not any(override.startswith("data.format=") for override in overrides):
        format = guess_format(_read_first_record(source, overrides))
        rows.append(f"data.format={format}")
        if format == "demonstrations":
            rows = ["data.train=[]", f"data.demonstrations={names}", "data.format=preference"]
    return read_recipe("pairs", ["model.path=world", *rows, *overrides, *model_override])


def _read_first_record(source: str, overrides: Sequence[str]) -> dict[str, object]:
    """Read the first row of a file or of a data set of the Hugging Face Hub."""
    if source.startswith("hub:"):
        dataset, data_dir = split_hub_name(source)
        revision = [word.partition("=")[2] for word in overrides if word.startswith("data.revision=")]
        records = read_hub_records(
            dataset, split="train", data_dir=data_dir, revision=revision[-1] if revision else None
        )
    else:
        records = read_records(expand_home(source))
    _, record = next(records, (0, {}))
    return {} if isinstance(record, RowError) else record


def make_preview(recipe: Recipe) -> DataPreview:
    """Read a recipe's rows as the data stage does and summarize them; bad rows are listed, not refused.

    Raises `InputError` if no row can be used.
    """
    settings = fill_in_world_row_counts(recipe.data)
    tokenizer = read_pretrained_tokenizer(recipe.model, settings.special_tokens)
    rows = read_source_rows(settings, tokenizer)
    if rows.total_count == len(rows.bad):
        raise_for_bad_rows(rows.bad, rows.total_count)
    warnings, pairs = _list_model_problems(recipe), rows.preferences
    split = SplitRows(pairs["train"], pairs["test"], pairs["second"], rows.demonstrations)
    if split.train or split.test:
        try:
            split = split_source_rows(settings, rows)
        except InputError as error:
            warnings.append(str(error))
    figures = compute_data_statistics(settings, rows, split, tokenizer)
    examples = make_examples(recipe, split.train, split.demonstrations, tokenizer)
    counts = _format_row_counts(rows, figures) | _count_truncated(recipe, split, tokenizer)
    return DataPreview(
        examples,
        _describe_special_tokens(examples, tokenizer),
        counts,
        describe_data_statistics(figures),
        warnings,
        rows.bad,
    )


def make_examples(
    recipe: Recipe,
    preferences: Sequence[Preference],
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenizedExample]:
    """Tokenize the first row of each kind, without a demonstration that is the chosen completion of the pair."""
    examples = []
    for pair in preferences[:1]:
        limit, completions = recipe.reward.max_completion_tokens, {"chosen": pair.chosen, "rejected": pair.rejected}
        examples.append(_tokenize_example("preference", pair.prompt, completions, tokenizer, limit))
    for row in demonstrations[:1]:
        if preferences and (row.prompt, row.completion) == (preferences[0].prompt, preferences[0].chosen):
            continue
        completions, limit = {"completion": row.completion}, recipe.sft.max_completion_tokens
        examples.append(_tokenize_example("demonstration", row.prompt, completions, tokenizer, limit))
    return examples


def _tokenize_example(
    kind: str, prompt: Prompt, completions: dict[str, str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> TokenizedExample:
    prompt_tokens, completion_tokens = tokenize_row(tokenizer, prompt, list(completions.values()), max_tokens=limit)
    texts = [TokenizedText("prompt", split_into_pieces(tokenizer, prompt_tokens), len(prompt_tokens), trained=False)]
    for name, tokens in zip(completions, completion_tokens, strict=True):
        pieces = split_into_pieces(tokenizer, tokens, before=prompt_tokens)
        truncated = tokens[-1] != find_end_token_id(tokenizer)
        texts.append(TokenizedText(name, pieces, len(tokens), trained=True, truncated=truncated))
    return TokenizedExample(kind, texts)


def split_into_pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, before: Sequence[int] = ()
) -> list[TokenText]:
    """Split tokens into pieces of text: one a token, or one for several tokens that share a character."""
    control = set(get_control_token_ids(tokenizer).values())
    whole, first = [*before, *tokens], len(before)
    pieces, start = [], first
    for end in range(first + 1, len(whole) + 1):
        if whole[end - 1] in control:
            pieces.append(
                TokenText(escape_invisible(str(tokenizer.convert_ids_to_tokens(whole[end - 1]))), control=True)
            )
            start = end
            continue
        text = _decode_added_text(tokenizer, whole[max(0, start - CONTEXT_TOKENS) : start], whole[start:end])
        if text.endswith("\ufffd") and end - start < 4 and end < len(whole) and whole[end] not in control:
            continue
        pieces.append(TokenText(escape_invisible(text), control=False))
        start = end
    return pieces


def _decode_added_text(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str:
    """Decode tokens as the text that they add to the text of the context."""
    with_context, alone = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in ([*context, *tokens], context)
    )
    if with_context.startswith(alone):
        return str(with_context[len(alone) :])
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _describe_special_tokens(examples: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Describe in two lines the tokens that prompts begin and completions end with."""
    begin, end, eos = tokenizer.bos_token_id, find_end_token_id(tokenizer), tokenizer.eos_token_id
    begins = any(example.texts[0].pieces[0].text == _format_token(tokenizer, begin) for example in examples)
    named = "the tokenizer has no BOS" if begin is None else f"BOS is {_format_token(tokenizer, begin)} ({begin})"
    lines = [f"{named}; prompts begin {'with it' if begins else 'without one'}"]
    other = f"; the tokenizer's eos is {_format_token(tokenizer, eos)} ({eos})" if eos not in (None, end) else ""
    return [*lines, f"completions end with {_format_token(tokenizer, end)} ({end}){other}"]


def _format_token(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    return "" if token is None else escape_invisible(str(tokenizer.convert_ids_to_tokens(token)))


def _list_model_problems(recipe: Recipe) -> list[str]:
    try:
        with explain_validation_errors():
            Pretrained(special_tokens=recipe.data.special_tokens, **dict(recipe.model))
    except InputError as error:
        return [str(error)]
    return []


def _format_row_counts(rows: SourceRows, figures: dict[str, Any]) -> dict[str, str]:
    return {
        "rows": f"{rows.total_count:,} read: {figures['train_rows']:,} to train, {figures['test_rows']:,} to test, "
        f"{figures['demonstration_rows']:,} demonstrations",
        "bad": f"{figures['bad_rows']:,}, of which {figures['equal_sides']:,} with identical completions",
        "duplicate": _format_counts_by_part(figures["duplicate_rows"]),
        "contradictory": _format_counts_by_part(figures["contradictory_rows"]),
        "prompts in train and test": f"{figures['shared_prompts']:,} of {figures['test_prompts']:,} test prompts",
    }


def _format_counts_by_part(counts: dict[str, int]) -> str:
    """Format counts such as `2 in train, 0 in test`."""
    return ", ".join(f"{count:,} in {part}" for part, count in counts.items())


def _count_truncated(recipe: Recipe, split: SplitRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Count completions that would be truncated, and pairs whose completions are identical after that."""
    end = find_end_token_id(tokenizer)
    lines = {}
    if pairs := draw_subset(split.train, MAX_TOKENIZED_ROWS, COMPARISON_SEED):
        limit = recipe.reward.max_completion_tokens
        completions = [
            tokenize_row(tokenizer, row.prompt, [row.chosen, row.rejected], max_tokens=limit)[1] for row in pairs
        ]
        truncated = sum(tokens[-1] != end for pair in completions for tokens in pair)
        lines["truncated"] = (
            f"{truncated:,} of {2 * len(pairs):,} completions are longer than max_completion_tokens {limit}"
        )
        identical = sum(chosen == rejected for chosen, rejected in completions)
        lines["identical after truncation"] = f"{identical:,} of {len(pairs):,} pairs"
    if demonstrations := draw_subset(split.demonstrations, MAX_TOKENIZED_ROWS, COMPARISON_SEED):
        limit = recipe.sft.max_completion_tokens
        tokens = [
            tokenize_row(tokenizer, row.prompt, [row.completion], max_tokens=limit)[1][0] for row in demonstrations
        ]
        truncated = sum(completion[-1] != end for completion in tokens)
        lines["truncated demonstrations"] = (
            f"{truncated:,} of {len(demonstrations):,} are longer than max_completion_tokens {limit}"
        )
    return lines


def describe_training_data(recipe: Recipe, data: Path, model: Path) -> list[str]:
    """Describe the data of a run in four lines: numbers of rows, and the first pair in the model's tokens."""
    tokenizer = load_tokenizer(model)
    row = read_table(data / "train.parquet", ["prompt", "chosen", "rejected"])[0]
    example = make_examples(recipe, [Preference(**row)], [], tokenizer)[0]
    figures = read_stage_summary(data)
    with explain_summary_errors():
        counts = (
            f"{figures['train_rows']:,} pairs to train, {figures['test_rows']:,} to test, "
            f"{figures['demonstration_rows']:,} demonstrations"
        )
    heading = f"{counts}; {'; '.join(_describe_special_tokens([example], tokenizer))}; the first pair:"
    return [heading, *map(_format_on_one_line, example.texts)]


def _format_on_one_line(tokenized: TokenizedText) -> str:
    """Format a text on one line, without the middle of a long text."""
    text = tokenized.text.replace("\n", "⏎")
    short = text if len(text) <= 2 * END_CHARACTERS + 3 else f"{text[:END_CHARACTERS]} … {text[-END_CHARACTERS:]}"
    use = "trained on" if tokenized.trained else "not trained on"
    cut = ", truncated" if tokenized.truncated else ""
    return f"  {tokenized.name:<10} {tokenized.tokens:>4} tokens, {use}{cut}: {short}"


def shorten_pieces(pieces: Sequence[TokenText], limit: int) -> Iterator[TokenText | int]:
    """Yield the first and the last pieces, `limit` in all, and between them the number of pieces omitted."""
    if len(pieces) <= limit:
        yield from pieces
        return
    tail = limit // 3
    yield from pieces[: limit - tail]
    yield len(pieces) - limit
    yield from pieces[-tail:]
