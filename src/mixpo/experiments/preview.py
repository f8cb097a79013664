"""What would be learnt from rows, before it is: a row of each kind in tokens, and what is worth knowing of the rest."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.rows import BadRow, Demonstration, Preference, Prompt, RowError, refuse_bad_rows
from mixpo.data.sources import (
    guess_format,
    hub_records,
    is_data_file,
    local_path,
    read_preference_rows,
    read_records,
)
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import find_end_token, list_control_tokens, tokenize_row
from mixpo.experiments.expressions import explain_stage_errors
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.models.folders import load_tokenizer
from mixpo.stages.data import (
    SourceRows,
    SplitRows,
    count_row_facts,
    describe_row_facts,
    fill_in_world_rows,
    hub_parts,
    read_sources,
    reading_figures,
    split_rows,
)
from mixpo.stages.engine import read_summary
from mixpo.stages.pretrained import Pretrained, read_tokenizer

MEASURED = 1000
"""Completions are counted in tokens for at most so many rows, which are drawn."""
CONTEXT = 6
"""A token's text is what it adds to the text of so many tokens before it."""
LINE = 60
"""Characters of each end of a text on one line of the first lines of a run."""


@dataclass(frozen=True)
class TokenText:
    """The text of a token, or of several that share a character."""

    text: str
    """Fit to be shown: control characters are visible."""
    control: bool
    """Whether it is a control token, which no text becomes, such as the end token."""


@dataclass(frozen=True)
class TokenizedText:
    """A prompt or a completion in tokens."""

    name: str
    pieces: list[TokenText]
    tokens: int
    trained: bool
    """Whether the loss counts its tokens."""
    truncated: bool = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Example:
    """A row: its prompt and its completions."""

    kind: str
    sides: list[TokenizedText]


@dataclass
class Preview:
    """What a person should see before anything trains."""

    examples: list[Example]
    tokens: list[str]
    """How prompts begin and completions end."""
    counts: dict[str, str]
    facts: list[str]
    """What is worth knowing of the rows."""
    warnings: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def read_source(source: str, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Read a recipe by its name or file; or make one, as `mixpo run pairs data.train=SOURCE` would, of a data source.

    A source's format is guessed from its first row where the overrides do not say it.
    """
    of_model = [f"model.path={json.dumps(model, ensure_ascii=False)}"] if model else []
    if not (source.startswith("hub:") or is_data_file(source)):
        return read_recipe(source, [*overrides, *of_model])
    format = guess_format(_first_record(source, overrides))
    names = json.dumps([source], ensure_ascii=False)
    rows = [f"data.train={names}", f"data.format={format}"]
    if format == "demonstrations":
        rows = ["data.train=[]", f"data.demonstrations={names}", "data.format=preference"]
    return read_recipe("pairs", ["model.path=world", *rows, *overrides, *of_model])


def _first_record(source: str, overrides: Sequence[str]) -> dict[str, object]:
    if source.startswith("hub:"):
        dataset, data_dir = hub_parts(source)
        revision = [word.partition("=")[2] for word in overrides if word.startswith("data.revision=")]
        records = hub_records(dataset, split="train", data_dir=data_dir, revision=revision[-1] if revision else None)
    else:
        records = read_records(local_path(source))
    _, record = next(records, (0, {}))
    return {} if isinstance(record, RowError) else record


def make_preview(recipe: Recipe) -> Preview:
    """Read a recipe's rows as the data stage would and look at them; bad rows are shown, not refused.

    Raises `InputError` if no row can be used.
    """
    settings = fill_in_world_rows(recipe.data)
    tokenizer = read_tokenizer(recipe.model, settings.special_tokens)
    rows = read_sources(settings, tokenizer)
    if rows.total == len(rows.bad):
        refuse_bad_rows(rows.bad, rows.total)
    warnings, given = _check_model(recipe), rows.preferences
    split = SplitRows(given["train"], given["test"], given["second"], rows.demonstrations)
    if split.train or split.test:
        try:
            split = split_rows(settings, rows)
        except InputError as error:
            warnings.append(str(error))
    figures = count_row_facts(settings, rows, split, tokenizer)
    shown = make_examples(recipe, split.train, split.demonstrations, tokenizer)
    counts = _counts(rows, figures) | _cut(recipe, split, tokenizer)
    return Preview(shown, _describe_tokens(shown, tokenizer), counts, describe_row_facts(figures), warnings, rows.bad)


def make_examples(
    recipe: Recipe,
    preferences: Sequence[Preference],
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """Put the first row of each kind into tokens; a demonstration that is the preference's chosen side says no more."""
    found = []
    for row in preferences[:1]:
        limit, sides = recipe.reward.max_completion_tokens, {"chosen": row.chosen, "rejected": row.rejected}
        found.append(_example("preference", row.prompt, sides, tokenizer, limit))
    for shown in demonstrations[:1]:
        if preferences and (shown.prompt, shown.completion) == (preferences[0].prompt, preferences[0].chosen):
            continue  # made of the preference that is there already
        sides, limit = {"completion": shown.completion}, recipe.sft.max_completion_tokens
        found.append(_example("demonstration", shown.prompt, sides, tokenizer, limit))
    return found


def _example(
    kind: str, prompt: Prompt, completions: dict[str, str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Example:
    before, drawn = tokenize_row(tokenizer, prompt, list(completions.values()), limit=limit)
    sides = [TokenizedText("prompt", split_into_pieces(tokenizer, before), len(before), trained=False)]
    for name, tokens in zip(completions, drawn, strict=True):
        pieces = split_into_pieces(tokenizer, tokens, before=before)
        cut = tokens[-1] != find_end_token(tokenizer)
        sides.append(TokenizedText(name, pieces, len(tokens), trained=True, truncated=cut))
    return Example(kind, sides)


def split_into_pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, before: Sequence[int] = ()
) -> list[TokenText]:
    """The text that each token adds to the tokens before it; tokens that share a character are one piece."""
    control = set(list_control_tokens(tokenizer).values())
    whole, first = [*before, *tokens], len(before)
    pieces, start = [], first
    for end in range(first + 1, len(whole) + 1):
        if whole[end - 1] in control:
            pieces.append(
                TokenText(escape_invisible(str(tokenizer.convert_ids_to_tokens(whole[end - 1]))), control=True)
            )
            start = end
            continue
        text = _added_text(tokenizer, whole[max(0, start - CONTEXT) : start], whole[start:end])
        if text.endswith("\ufffd") and end - start < 4 and end < len(whole) and whole[end] not in control:
            continue
        pieces.append(TokenText(escape_invisible(text), control=False))
        start = end
    return pieces


def _added_text(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str:
    with_context, alone = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in ([*context, *tokens], context)
    )
    if with_context.startswith(alone):
        return str(with_context[len(alone) :])
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _describe_tokens(shown: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How prompts begin and completions end, by the names of the tokens."""
    begin, end, eos = tokenizer.bos_token_id, find_end_token(tokenizer), tokenizer.eos_token_id
    begins = any(example.sides[0].pieces[0].text == _name(tokenizer, begin) for example in shown)
    named = "the tokenizer has no BOS" if begin is None else f"BOS is {_name(tokenizer, begin)} ({begin})"
    lines = [f"{named}; prompts begin {'with it' if begins else 'without one'}"]
    other = f"; the tokenizer's eos is {_name(tokenizer, eos)} ({eos})" if eos not in (None, end) else ""
    return [*lines, f"completions end with {_name(tokenizer, end)} ({end}){other}"]


def _name(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    return "" if token is None else escape_invisible(str(tokenizer.convert_ids_to_tokens(token)))


def _check_model(recipe: Recipe) -> list[str]:
    """Why no run could start from the model, as far as its folder tells."""
    try:
        with explain_stage_errors():
            Pretrained(special_tokens=recipe.data.special_tokens, **dict(recipe.model))
    except InputError as error:
        return [str(error)]
    return []


def _counts(rows: SourceRows, figures: dict[str, Any]) -> dict[str, str]:
    return {
        "rows": f"{rows.total:,} read: {figures['train_rows']:,} to train, {figures['test_rows']:,} to test, "
        f"{figures['demonstration_rows']:,} demonstrations",
        "bad": f"{figures['bad_rows']:,}, of which {figures['equal_sides']:,} with equal sides",
        "duplicate": _of_parts(figures["duplicate_rows"]),
        "contradictory": _of_parts(figures["contradictory_rows"]),
        "prompts in train and test": f"{figures['shared_prompts']:,} of {figures['test_prompts']:,} test prompts",
    }


def _of_parts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} in {part}" for part, count in counts.items())


def _cut(recipe: Recipe, split: SplitRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """How many completions would be cut, and the pairs that this leaves with two equal sides."""
    end = find_end_token(tokenizer)
    lines = {}
    if pairs := draw_subset(split.train, MEASURED, COMPARISON_SEED):
        limit = recipe.reward.max_completion_tokens
        sides = [tokenize_row(tokenizer, row.prompt, [row.chosen, row.rejected], limit=limit)[1] for row in pairs]
        cut = sum(tokens[-1] != end for both in sides for tokens in both)
        lines["cut"] = f"{cut:,} of {2 * len(pairs):,} sides are longer than max_completion_tokens {limit}"
        lines["equal after the cut"] = f"{sum(one == other for one, other in sides):,} of {len(pairs):,} pairs"
    if shown := draw_subset(split.demonstrations, MEASURED, COMPARISON_SEED):
        limit = recipe.sft.max_completion_tokens
        tokens = [tokenize_row(tokenizer, row.prompt, [row.completion], limit=limit)[1][0] for row in shown]
        cut = sum(one[-1] != end for one in tokens)
        lines["cut demonstrations"] = f"{cut:,} of {len(shown):,} are longer than max_completion_tokens {limit}"
    return lines


def first_lines(recipe: Recipe, data: Path, model: Path) -> list[str]:
    """Say in four lines what a run learns from: a data stage's first pair as the model's tokenizer has it."""
    tokenizer = load_tokenizer(model)
    example = make_examples(recipe, read_preference_rows(data / "train.parquet"), [], tokenizer)[0]
    figures = read_summary(data)
    with reading_figures():
        counts = (
            f"{figures['train_rows']:,} pairs to train, {figures['test_rows']:,} to test, "
            f"{figures['demonstration_rows']:,} demonstrations"
        )
    heading = f"{counts}; {'; '.join(_describe_tokens([example], tokenizer))}; the first pair:"
    return [heading, *map(_on_one_line, example.sides)]


def _on_one_line(side: TokenizedText) -> str:
    text = side.text.replace("\n", "⏎")
    short = text if len(text) <= 2 * LINE + 3 else f"{text[:LINE]} … {text[-LINE:]}"
    fate = "trained on" if side.trained else "given"
    return f"  {side.name:<10} {side.tokens:>4} tokens, {fate}{', cut' if side.truncated else ''}: {short}"


def shorten_pieces(pieces: Sequence[TokenText], most: int) -> Iterator[TokenText | int]:
    """The first and the last pieces, and between them the number of those left out."""
    if len(pieces) <= most:
        yield from pieces
        return
    tail = most // 3
    yield from pieces[: most - tail]
    yield len(pieces) - most
    yield from pieces[-tail:]
