"""Preview of the rows of a recipe before training: a row of each kind in tokens, counts, and problems."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.rows import BadRow, Demonstration, Preference, Prompt, RowError, raise_for_bad_rows
from mixpo.data.sources import expand_home, guess_format, is_data_file, read_hub_records, read_records
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import find_completion_end_token, get_control_token_ids, tokenize_row
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
class TokenPiece:
    """A piece of a decoded text: one token, or several tokens that share a character."""

    text: str
    """Text in which control characters are escaped."""
    control: bool
    """True for a control token, such as the end token."""


@dataclass(frozen=True)
class TokenPreview:
    """A prompt or a completion split into its tokens for display, and whether training uses and truncates it."""

    name: str
    pieces: list[TokenPiece]
    token_count: int
    trained: bool
    """True if its tokens are in the loss."""
    truncated: bool = False

    @property
    def text(self) -> str:
        """The whole text, with control characters escaped."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class TokenizedExample:
    """A preference pair or a demonstration in tokens: its prompt and its completions."""

    kind: str
    texts: list[TokenPreview]


@dataclass
class DataPreview:
    """What `mixpo data preview` prints: example rows in tokens, counts, facts, warnings and bad rows."""

    examples: list[TokenizedExample]
    token_lines: list[str]
    """Lines on the tokens that prompts begin and completions end with."""
    counts: dict[str, str]
    facts: list[str]
    """Lines on the columns that are read, duplicates, contradictions and shared prompts."""
    warnings: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def read_recipe_or_source(recipe_or_source: str, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Read a recipe by name or file, or make one whose rows are a data source: a file of rows or hub:NAME.

    The format of a source is guessed from its first row unless an override sets it.
    """
    model_override = [f"model.path={json.dumps(model, ensure_ascii=False)}"] if model else []
    if not (recipe_or_source.startswith("hub:") or is_data_file(recipe_or_source)):
        return read_recipe(recipe_or_source, [*overrides, *model_override])
    names = json.dumps([recipe_or_source], ensure_ascii=False)
    rows = [f"data.train={names}"]
    if not any(override.startswith("data.format=") for override in overrides):
        format = guess_format(_read_first_record(recipe_or_source, overrides))
        rows.append(f"data.format={format}")
        if format == "demonstrations":
            rows = ["data.train=[]", f"data.demonstrations={names}", "data.format=preference"]
    return read_recipe("pairs", ["model.path=world", *rows, *overrides, *model_override])


def _read_first_record(source: str, overrides: Sequence[str]) -> dict[str, object]:
    """Read the first row of a file or of a Hub data set; an empty dictionary if there is none or it is unreadable."""
    if source.startswith("hub:"):
        dataset, data_dir = split_hub_name(source)
        revisions = [word.partition("=")[2] for word in overrides if word.startswith("data.revision=")]
        revision = revisions[-1] if revisions else None
        records = read_hub_records(dataset, split="train", data_dir=data_dir, revision=revision)
    else:
        records = read_records(expand_home(source))
    _, record = next(records, (0, {}))
    return {} if isinstance(record, RowError) else record


def make_data_preview(recipe: Recipe) -> DataPreview:
    """Read a recipe's rows as the data stage does and summarize them; bad rows are returned in it, not raised.

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
    examples = tokenize_first_rows(recipe, split.train, split.demonstrations, tokenizer)
    counts = _format_row_counts(rows, figures) | _describe_truncation(recipe, split, tokenizer)
    token_lines, facts = _describe_special_tokens(examples, tokenizer), describe_data_statistics(figures)
    return DataPreview(examples, token_lines, counts, facts, warnings, rows.bad)


def tokenize_first_rows(
    recipe: Recipe,
    preferences: Sequence[Preference],
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenizedExample]:
    """Tokenize the first pair and the first demonstration, unless that is the pair's prompt and chosen completion."""
    examples = []
    for pair in preferences[:1]:
        limit, completions = recipe.reward.max_completion_tokens, {"chosen": pair.chosen, "rejected": pair.rejected}
        examples.append(_tokenize_row_for_display("preference", pair.prompt, completions, tokenizer, limit))
    for row in demonstrations[:1]:
        if preferences and (row.prompt, row.completion) == (preferences[0].prompt, preferences[0].chosen):
            continue
        completions, limit = {"completion": row.completion}, recipe.sft.max_completion_tokens
        examples.append(_tokenize_row_for_display("demonstration", row.prompt, completions, tokenizer, limit))
    return examples


def _tokenize_row_for_display(
    kind: str, prompt: Prompt, completions: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> TokenizedExample:
    """Tokenize a prompt and its completions (text by name) as training does, truncated to the maximum."""
    prompt_tokens, completion_tokens = tokenize_row(tokenizer, prompt, [*completions.values()], max_tokens=max_tokens)
    texts = [TokenPreview("prompt", split_into_pieces(tokenizer, prompt_tokens), len(prompt_tokens), trained=False)]
    for name, tokens in zip(completions, completion_tokens, strict=True):
        pieces = split_into_pieces(tokenizer, tokens, preceding_ids=prompt_tokens)
        truncated = tokens[-1] != find_completion_end_token(tokenizer)
        texts.append(TokenPreview(name, pieces, len(tokens), trained=True, truncated=truncated))
    return TokenizedExample(kind, texts)


def split_into_pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, preceding_ids: Sequence[int] = ()
) -> list[TokenPiece]:
    """Decode token ids as pieces of text: one a token, or one for several tokens that share a character."""
    control = set(get_control_token_ids(tokenizer).values())
    whole, first = [*preceding_ids, *token_ids], len(preceding_ids)
    pieces, start = [], first
    for end in range(first + 1, len(whole) + 1):
        if whole[end - 1] in control:
            pieces.append(TokenPiece(_format_token(tokenizer, whole[end - 1]), control=True))
            start = end
            continue
        text = _decode_added_text(tokenizer, whole[max(0, start - CONTEXT_TOKENS) : start], whole[start:end])
        if text.endswith("\ufffd") and end - start < 4 and end < len(whole) and whole[end] not in control:
            continue
        pieces.append(TokenPiece(escape_invisible(text), control=False))
        start = end
    return pieces


def _decode_added_text(tokenizer: PreTrainedTokenizerBase, context_ids: list[int], token_ids: list[int]) -> str:
    """Decode token ids as the text that they add after the text of the context's token ids."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    with_context, alone = decode([*context_ids, *token_ids]), decode(context_ids)
    return str(with_context[len(alone) :] if with_context.startswith(alone) else decode(token_ids))


def _describe_special_tokens(examples: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return two lines of text: the token that prompts begin with, and the token that completions end with."""
    begin, end, eos = tokenizer.bos_token_id, find_completion_end_token(tokenizer), tokenizer.eos_token_id
    begins = any(example.texts[0].pieces[0].text == _format_token(tokenizer, begin) for example in examples)
    named = "the tokenizer has no BOS" if begin is None else f"BOS is {_format_token(tokenizer, begin)} ({begin})"
    lines = [f"{named}; prompts begin {'with it' if begins else 'without one'}"]
    other = f"; the tokenizer's eos is {_format_token(tokenizer, eos)} ({eos})" if eos not in (None, end) else ""
    return [*lines, f"completions end with {_format_token(tokenizer, end)} ({end}){other}"]


def _format_token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    """Return the text of a token id with control characters escaped; empty for None."""
    return "" if token_id is None else escape_invisible(str(tokenizer.convert_ids_to_tokens(token_id)))


def _list_model_problems(recipe: Recipe) -> list[str]:
    """List the error in a recipe's model settings as a message, without raising it; empty if there is none."""
    try:
        with explain_validation_errors():
            Pretrained(special_tokens=recipe.data.special_tokens, **dict(recipe.model))
    except InputError as error:
        return [str(error)]
    return []


def _format_row_counts(rows: SourceRows, figures: dict[str, Any]) -> dict[str, str]:
    """Format the counts of read, bad, duplicate, contradictory and shared rows: sentence by label."""
    return {
        "rows": f"{rows.total_count:,} read: {figures['train_rows']:,} to train, {figures['test_rows']:,} to test, "
        f"{figures['demonstration_rows']:,} demonstrations",
        "bad": f"{figures['bad_rows']:,}, of which {figures['equal_sides']:,} with identical completions",
        "duplicate": _format_counts_by_split(figures["duplicate_rows"]),
        "contradictory": _format_counts_by_split(figures["contradictory_rows"]),
        "prompts in train and test": f"{figures['shared_prompts']:,} of {figures['test_prompts']:,} test prompts",
    }


def _format_counts_by_split(counts_by_split: dict[str, int]) -> str:
    """Format counts of rows as `2 in train, 0 in test`."""
    return ", ".join(f"{count:,} in {part}" for part, count in counts_by_split.items())


def _describe_truncation(recipe: Recipe, split_rows: SplitRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Describe how many completions are truncated, and pairs thereby identical, in a draw of rows: text by label."""
    end = find_completion_end_token(tokenizer)
    lines = {}
    if pairs := draw_subset(split_rows.train, MAX_TOKENIZED_ROWS, COMPARISON_SEED):
        limit = recipe.reward.max_completion_tokens
        tokens = [tokenize_row(tokenizer, row.prompt, [row.chosen, row.rejected], max_tokens=limit)[1] for row in pairs]
        truncated = sum(side[-1] != end for sides in tokens for side in sides)
        lines["truncated"] = (
            f"{truncated:,} of {2 * len(pairs):,} completions are longer than max_completion_tokens {limit}"
        )
        identical = sum(chosen == rejected for chosen, rejected in tokens)
        lines["identical after truncation"] = f"{identical:,} of {len(pairs):,} pairs"
    if demonstrations := draw_subset(split_rows.demonstrations, MAX_TOKENIZED_ROWS, COMPARISON_SEED):
        limit = recipe.sft.max_completion_tokens
        tokens = [tokenize_row(tokenizer, row.prompt, [row.completion], max_tokens=limit)[1] for row in demonstrations]
        truncated = sum(completion[-1] != end for (completion,) in tokens)
        lines["truncated demonstrations"] = (
            f"{truncated:,} of {len(demonstrations):,} are longer than max_completion_tokens {limit}"
        )
    return lines


def describe_training_data(recipe: Recipe, data_folder: Path, model_folder: Path) -> list[str]:
    """Return four lines on the data of a run: numbers of rows, and the first pair in the model's tokens."""
    tokenizer = load_tokenizer(model_folder)
    row = read_table(data_folder / "train.parquet", ["prompt", "chosen", "rejected"])[0]
    example = tokenize_first_rows(recipe, [Preference(**row)], [], tokenizer)[0]
    figures = read_stage_summary(data_folder)
    with explain_summary_errors():
        counts = (
            f"{figures['train_rows']:,} pairs to train, {figures['test_rows']:,} to test, "
            f"{figures['demonstration_rows']:,} demonstrations"
        )
    heading = f"{counts}; {'; '.join(_describe_special_tokens([example], tokenizer))}; the first pair:"
    return [heading, *map(_format_tokens_on_one_line, example.texts)]


def _format_tokens_on_one_line(token_preview: TokenPreview) -> str:
    """Format a text's name, token count and use in training, and the text without its middle if it is long."""
    text = token_preview.text.replace("\n", "⏎")
    short = text if len(text) <= 2 * END_CHARACTERS + 3 else f"{text[:END_CHARACTERS]} … {text[-END_CHARACTERS:]}"
    use = "trained on" if token_preview.trained else "not trained on"
    cut = ", truncated" if token_preview.truncated else ""
    return f"  {token_preview.name:<10} {token_preview.token_count:>4} tokens, {use}{cut}: {short}"


def shorten_pieces(pieces: Sequence[TokenPiece], max_pieces: int) -> Iterator[TokenPiece | int]:
    """Yield the first and the last pieces, `max_pieces` in all, and between them the number of pieces omitted."""
    if len(pieces) <= max_pieces:
        yield from pieces
        return
    tail = max_pieces // 3
    yield from pieces[: max_pieces - tail]
    yield len(pieces) - max_pieces
    yield from pieces[-tail:]
