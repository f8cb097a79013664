"""Data: reading, validation, splitting and tokenization of all rows, once, before training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pydantic
from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.rows import (
    EQUAL_COMPLETIONS,
    FIX_HINT,
    BadRow,
    Demonstration,
    Preference,
    Prompt,
    RowError,
    convert_to_messages,
    count_repeated_rows,
    describe_type,
    make_prompt_key,
    raise_for_bad_rows,
)
from mixpo.data.sources import (
    Format,
    ParsedRows,
    PromptCheck,
    Row,
    compute_source_identity,
    expand_home,
    read_demonstrations,
    read_hub_demonstrations,
    read_hub_preferences,
    read_preferences,
)
from mixpo.data.splits import draw_subset, split_by_prompt
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import check_tokenizer, compute_tokenization_digest, find_tokenization_warnings, tokenize_prompt
from mixpo.data.world import WORLD_VERSION, generate_world_rows
from mixpo.models.folders import load_tokenizer
from mixpo.settings import Settings
from mixpo.stages.rows import add_token_columns, write_table
from mixpo.stages.stage import DataStage, Part, PolicyStage
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.record import append_jsonl, progress_listener


class DataSettings(Settings):
    """Settings of a data stage: the sources of preference rows and demonstrations, and their split."""

    format: Literal["world"] | Format = "world"
    """`world` is generated; `preference` has `prompt`, `chosen`, `rejected`; the others are their publishers' rows."""
    train: tuple[str, ...] = ()
    """Files (.jsonl, .jsonl.gz, .json, .parquet, .csv), or `hub:NAME` or `hub:NAME/DATA_DIR`, of preference rows."""
    test: tuple[str, ...] = ()
    """The same for held-out rows; if empty, `test_share` of the train prompts is held out."""
    demonstrations: tuple[str, ...] = ()
    """Files with `prompt` and `completion` for SFT; if empty, the chosen completions of train."""
    second: tuple[str, ...] = ()
    """The same as train for a second reward model, which only measures; see `second_rows`."""
    revision: str | None = None
    """The commit of a hub data set. Without it a cache knows the set by its name alone, whatever it held that day."""
    train_rows: int | None = pydantic.Field(None, ge=1)
    """Number of preference rows, a random subset by `data_seed`; all if not given. For the world: rows to generate."""
    test_rows: int | None = pydantic.Field(None, ge=1)
    demonstration_rows: int | None = pydantic.Field(None, ge=1)
    test_share: float = pydantic.Field(0.1, gt=0, lt=1)
    second_rows: int = pydantic.Field(0, ge=0)
    """Number of preference rows for a second reward model, with prompts that are neither in train nor test: drawn from
    `second`, or if that is empty held out of train (about as many). 0 trains no second reward model."""
    special_tokens: Literal["text", "parse"] = "text"
    """Meaning of names of control tokens such as `</s>` in prompts: `text`, so that no row can end or forge a turn, or
    `parse`, for prompts that are already rendered. In completions they are text."""
    shared_prompts: Literal["keep", "drop"] = "keep"
    """Treatment of rows of train and demonstrations whose prompt is also in the test files: `keep` reports the number
    of shared prompts, `drop` leaves the rows out."""
    max_prompt_tokens: int = pydantic.Field(512, ge=1)
    """A longer prompt is a bad row."""
    on_bad_row: Literal["error", "drop"] | None = None
    """`error` names the first ten and stops; `drop` counts them and lists them in `bad_rows.jsonl`.
    If not given: `drop` for hh-rlhf, whose raw rows hold a few uneven ones, `error` for all else."""
    data_seed: int = pydantic.Field(0, ge=0)

    @pydantic.field_validator("train", "test", "demonstrations", "second", mode="before")
    @classmethod
    def _wrap_single_name(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Validator: one file name becomes a tuple. Raises `InputError` on an empty name."""
        names = (value,) if isinstance(value, str) else value
        if isinstance(names, list | tuple) and "" in names:
            raise InputError(f"data.{info.field_name}: found ''; expected the name of a file or hub:NAME")
        return names


WORLD_ROWS = {"train_rows": 3072, "test_rows": 512, "demonstration_rows": 3072}
PARTS = ("train", "test", "second")
"""Parts of the preference rows."""


@dataclass
class SourceRows:
    """Preferences and demonstrations read from all sources, with their bad rows and columns, before the split."""

    preferences: dict[str, list[Preference]] = field(default_factory=lambda: {part: [] for part in PARTS})
    demonstrations: list[Demonstration] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    columns: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Columns `used` and `ignored`, by kind of row."""

    @property
    def total_count(self) -> int:
        """Number of rows of all kinds, bad ones included."""
        return sum(map(len, self.preferences.values())) + len(self.demonstrations) + len(self.bad)

    def add_source(self, row_kind: str, parsed: ParsedRows[Row]) -> list[Row]:
        """Add a parsed source's bad rows and columns to these, and return its good rows, which are not added."""
        self.bad += parsed.bad_rows
        columns = self.columns.setdefault(row_kind, {"used": [], "ignored": []})
        for name, names in (("used", parsed.used_columns), ("ignored", parsed.ignored_columns)):
            columns[name] = list(dict.fromkeys(columns[name] + names))
        return parsed.rows


@dataclass
class SplitRows:
    """Rows of each part after the split: train and test pairs, pairs of a second reward model, demonstrations."""

    train: list[Preference]
    test: list[Preference]
    second: list[Preference]
    demonstrations: list[Demonstration]
    dropped: int = 0
    """Rows dropped because their prompt is also a test prompt."""


def fill_in_world_row_counts(settings: DataSettings) -> DataSettings:
    """A copy of the settings with the world's default row counts filled in; other formats: the settings themselves."""
    if settings.format != "world":
        return settings
    return settings.model_copy(update={name: getattr(settings, name) or rows for name, rows in WORLD_ROWS.items()})


def refuse_files_of_world(settings: DataSettings) -> None:
    """Raise `InputError` if settings with the format `world`, whose rows are generated, name a file."""
    if names := [name for name in ("train", "test", "demonstrations", "second") if getattr(settings, name)]:
        raise InputError(
            f"data.{names[0]}: found {getattr(settings, names[0])[0]!r} beside format 'world', whose rows are "
            f"generated; expected files beside data.format={' or '.join(get_args(Format))}"
        )


def read_source_rows(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> SourceRows:
    """Read all rows of the sources, or generate the world's; rows with unusable prompts are returned as bad rows."""
    rows = SourceRows()
    if settings.format == "world":
        refuse_files_of_world(settings)
        world = generate_world_rows(
            demonstration_count=settings.demonstration_rows or 0,
            train_count=(settings.train_rows or 0) + settings.second_rows,
            test_count=settings.test_rows or 0,
            seed=settings.data_seed,
        )
        for part, pairs in (("train", world.train), ("test", world.test)):
            rows.preferences[part] = [Preference(convert_to_messages(prompt), *sides) for prompt, *sides in pairs]
        rows.demonstrations = [
            Demonstration(convert_to_messages(prompt), text) for prompt, text in world.demonstrations
        ]
    check = _make_prompt_check(settings, tokenizer)
    for part, split in (("train", "train"), ("test", "test"), ("second", "train")):
        for name in getattr(settings, part) if part != "second" or settings.second_rows else ():
            parsed = _read_preference_source(settings, name, split, check)
            rows.preferences[part] += rows.add_source("preferences", parsed)
    for name in settings.demonstrations:
        rows.demonstrations += rows.add_source("demonstrations", _read_demonstration_source(settings, name, check))
    return rows


def _make_prompt_check(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PromptCheck:
    """Make a function that raises `RowError` if a prompt is of another type than the first, empty or too long."""
    kinds: list[type] = []

    def check_prompt(prompt: Prompt) -> None:
        """Raise `RowError` if this prompt cannot be used."""
        kinds.append(type(prompt))
        if kinds[-1] is not kinds[0]:
            problem = f"is {describe_type(prompt)}, the first row's is not; expected one kind; {FIX_HINT}"
        elif not (length := len(tokenize_prompt(tokenizer, prompt))):
            problem = f"has no tokens; expected at least one, to predict the first token from; {FIX_HINT}"
        elif length > (most := settings.max_prompt_tokens):
            problem = f"has {length} tokens; expected at most {most}; drop the row or raise data.max_prompt_tokens"
        else:
            return
        raise RowError("prompt", problem)

    return check_prompt


def _read_preference_source(
    settings: DataSettings, source: str, split: str, check_prompt: PromptCheck
) -> ParsedRows[Preference]:
    """Read preference rows from a file or a Hugging Face data set (`hub:`); invalid rows are returned as bad rows."""
    assert settings.format != "world"
    if not source.startswith("hub:"):
        return read_preferences(expand_home(source), settings.format, check_prompt)
    dataset, data_dir = split_hub_name(source)
    return read_hub_preferences(
        dataset, settings.format, check_prompt, split=split, data_dir=data_dir, revision=settings.revision
    )


def _read_demonstration_source(
    settings: DataSettings, source: str, check_prompt: PromptCheck
) -> ParsedRows[Demonstration]:
    """Read demonstrations from a file or a Hugging Face data set (`hub:`); invalid rows are returned as bad rows."""
    if not source.startswith("hub:"):
        return read_demonstrations(expand_home(source), check_prompt)
    dataset, data_dir = split_hub_name(source)
    return read_hub_demonstrations(dataset, check_prompt, split="train", data_dir=data_dir, revision=settings.revision)


def split_hub_name(source_name: str) -> tuple[str, str | None]:
    """Split `hub:OWNER/NAME[/DATA_DIR]` into the data set's name and its folder, None if not given."""
    owner, *rest = source_name.removeprefix("hub:").split("/", 2)
    if not owner:
        raise InputError(f"{source_name}: found no name; expected hub:OWNER/NAME or hub:OWNER/NAME/DATA_DIR")
    return "/".join([owner, *rest[:1]]), "".join(rest[1:]) or None


def split_source_rows(settings: DataSettings, source_rows: SourceRows) -> SplitRows:
    """Hold out missing parts of the rows, drop shared prompts, draw subsets. Raises `InputError` on an empty part."""
    train, test, second = (source_rows.preferences[part] for part in PARTS)
    demonstrations = source_rows.demonstrations
    _refuse_empty_part("train", train, source_rows)
    if settings.test:
        _refuse_empty_part("test", test, source_rows)
    if settings.demonstrations:
        _refuse_empty_part("demonstrations", demonstrations, source_rows)
    if not test:
        train, test = _split_off_rows(train, settings.test_share, settings.data_seed)
    before = len(train) + len(demonstrations)
    if settings.shared_prompts == "drop":
        train, demonstrations = _remove_shared_prompts(train, test), _remove_shared_prompts(demonstrations, test)
        if not train or (source_rows.demonstrations and not demonstrations):
            raise InputError(
                f"data.shared_prompts: drop leaves no rows of data.{'demonstrations' if train else 'train'}: all their "
                "prompts stand in the test rows; expected other prompts to train on than to test on; name another file "
                "in data.test, or none, which holds out data.test_share"
            )
    dropped = before - len(train) - len(demonstrations)
    if settings.second_rows and not settings.second:
        if settings.second_rows >= len(train):
            raise InputError(
                f"data.second_rows: found {settings.second_rows} of {len(train)} train rows, which leaves none to "
                "train on; expected fewer, or files of their own in data.second"
            )
        train, second = _split_off_rows(train, settings.second_rows / len(train), settings.data_seed + 1)
    train = draw_subset(train, settings.train_rows, settings.data_seed)
    test = draw_subset(test, settings.test_rows, settings.data_seed)
    demonstrations = demonstrations or [Demonstration(row.prompt, row.chosen) for row in train]
    demonstrations = draw_subset(demonstrations, settings.demonstration_rows, settings.data_seed)
    if settings.second_rows:
        _refuse_empty_part("second", second, source_rows)
        independent = _remove_shared_prompts(_remove_shared_prompts(second, train), test)
        if not independent:
            raise InputError(
                f"data.second: all {len(second)} rows have prompts of train or test rows; expected others, on which "
                "the second reward model can be independent; name another file"
            )
        second = draw_subset(independent, settings.second_rows, settings.data_seed)
    return SplitRows(train, test, second, demonstrations, dropped)


def _refuse_empty_part(part: str, part_rows: Sequence[Preference] | Sequence[Demonstration], rows: SourceRows) -> None:
    """Raise `InputError`, saying where the rows went, if a part of the rows is empty."""
    if not part_rows:
        why = f"all of its rows are among the {len(rows.bad)} bad ones" if rows.bad else "its files hold none"
        first = f"; the first is {rows.bad[0]}" if rows.bad else ""
        raise InputError(
            f"data.{part}: nothing is left of {rows.total_count} rows: {why}; expected at least one usable row{first}"
        )


def _split_off_rows(rows: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Split rows into two lists without a prompt in common; the second has about `share` of the prompts."""
    remedy = "add rows, or name held-out rows in data.test (for a second reward model in data.second)"
    keys = [make_prompt_key(row.prompt) for row in rows]
    first, second = split_by_prompt(keys, share, seed, setting_name="data.train", remedy=remedy)
    return [rows[index] for index in first], [rows[index] for index in second]


def _remove_shared_prompts(rows: Sequence[Row], other_rows: Sequence[Preference]) -> list[Row]:
    """A list of the rows whose prompts are not among those of the other rows."""
    prompts = {make_prompt_key(row.prompt) for row in other_rows}
    return [row for row in rows if make_prompt_key(row.prompt) not in prompts]


def compute_data_statistics(
    settings: DataSettings, rows: SourceRows, split: SplitRows, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Counts of rows, duplicates, contradictions, shared prompts, and the tokenizer's warnings, as `summary.json`."""
    trained_rows: list[Preference | Demonstration] = [*split.train, *split.demonstrations]
    trained = {make_prompt_key(row.prompt) for row in trained_rows}
    tested = {make_prompt_key(row.prompt) for row in split.test}
    pairs = [*split.train, *split.test, *split.second]
    shown = split.demonstrations if rows.demonstrations else []  # others are made of train
    texts = [(row.prompt, [row.chosen, row.rejected]) for row in pairs]
    texts += [(row.prompt, [row.completion]) for row in shown]
    repeats = {name: count_repeated_rows(part) for name, part in (("train", split.train), ("test", split.test))}
    return {
        "format": settings.format,
        "columns": rows.columns,
        "train_rows": len(split.train),
        "test_rows": len(split.test),
        "demonstration_rows": len(split.demonstrations),
        "second_rows": len(split.second),
        "bad_rows": len(rows.bad),
        "equal_sides": sum(row.problem == EQUAL_COMPLETIONS for row in rows.bad),
        "duplicate_rows": {name: duplicate for name, (duplicate, _) in repeats.items()},
        "contradictory_rows": {name: contradictory for name, (_, contradictory) in repeats.items()},
        "test_prompts": len(tested),
        "shared_prompts": len(trained & tested),
        "shared_rows_dropped": split.dropped,
        "tokenizer": check_tokenizer(tokenizer) + find_tokenization_warnings(tokenizer, texts),
    }


@contextmanager
def explain_summary_errors() -> Iterator[None]:
    """Context manager: raise `InputError` in place of errors that a data summary without the expected counts causes."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"summary.json of the data stage: found no usable counts of its rows ({type(error).__name__}: {error}); "
            "expected those of this version; delete the stage's folder and run again"
        ) from error


@explain_summary_errors()
def describe_data_statistics(statistics: Mapping[str, Any]) -> list[str]:
    """Describe a data stage's `summary.json` as lines of text for the user: columns, duplicates, bad rows, ..."""
    lines = [
        f"{kind} read as {'demonstration' if kind == 'demonstrations' else statistics['format']}: "
        f"{escape_invisible(', '.join(columns['used']))}; "
        f"ignored: {escape_invisible(', '.join(columns['ignored'])) or 'nothing'}"
        for kind, columns in statistics["columns"].items()
    ]
    if list(statistics["columns"]) == ["preferences"]:
        lines.append("demonstrations for SFT are the chosen completions of train")
    ignored = [name for columns in statistics["columns"].values() for name in columns["ignored"]]
    if any(name.rpartition(".")[2] in ("tools", "tool_calls", "tool_call_id") for name in ignored):
        lines.append("tools and tool calls are ignored: mixpo renders the text of messages and nothing else")
    for name, problem in (
        ("duplicate_rows", "stand there already, word for word"),
        ("contradictory_rows", "contradict another, which prefers the other side"),
    ):
        for part, count in statistics[name].items():
            if count:
                lines.append(f"{part}: {count} of {statistics[f'{part}_rows']} rows {problem}")
    if statistics["shared_prompts"]:
        lines.append(
            f"{statistics['shared_prompts']} of {statistics['test_prompts']} test prompts are trained on too; "
            "data.shared_prompts=drop leaves their rows out"
        )
    if statistics["shared_rows_dropped"]:
        lines.append(f"{statistics['shared_rows_dropped']} rows left out, whose prompts are test prompts")
    if statistics["equal_sides"]:
        lines.append(f"{statistics['equal_sides']} of the bad rows have two equal sides")
    return [*lines, *statistics["tokenizer"]]


class Data(DataStage, DataSettings):
    """Stage of an experiment's rows: pairs in `train`, `test` and `second.parquet`, and `demonstrations.parquet`.

    Every row has `prompt_tokens` and the `tokens` of its completions, which other stages read.
    """

    parts = ("train", "second")
    is_shared = False

    base: PolicyStage
    """Model whose tokenizer the rows are tokenized with."""
    content: str = ""
    """Digests of the files and of what is read from their paths; computed by the validator."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_content_digest(cls, values: Any) -> Any:
        """Validator: fill in `content`, the digest of the files, and the embedded world's numbers of rows."""
        if not isinstance(values, dict) or values.get("content"):
            return values
        settings = DataSettings(**{name: values[name] for name in DataSettings.model_fields if name in values})
        if settings.format == "world":
            refuse_files_of_world(settings)
            rows = {name: getattr(fill_in_world_row_counts(settings), name) for name in WORLD_ROWS}
            return {**values, **rows, "content": f"world-{WORLD_VERSION}"}
        if not settings.train:
            raise InputError(f"data.train: found nothing; format {settings.format!r} expects a file or hub:NAME")
        groups = [settings.train, settings.test, settings.demonstrations]
        groups += [settings.second] if settings.second and settings.second_rows else []
        sources = {
            name: name if name.startswith("hub:") else compute_source_identity(expand_home(name), settings.format)
            for group in groups
            for name in group
        }
        return {**values, "content": " | ".join(" ".join(sources[name] for name in group) for group in groups)}

    @pydantic.model_validator(mode="after")
    def _check_special_tokens(self) -> Self:
        """Validator: raise `InputError` if the base model was saved with another `special_tokens`."""
        if (of_base := getattr(self.base, "special_tokens", self.special_tokens)) != self.special_tokens:
            raise InputError(
                f"data.special_tokens: found {self.special_tokens!r}, and {of_base!r} in the model that the rows are "
                "for, which keeps it for every stage; expected the same in Pretrained and Data"
            )
        return self

    def list_fields_outside_identity(self) -> list[str]:
        """Names of the fields with paths, which are not in the stage's identity: the digest of their content is."""
        return ["train", "test", "demonstrations", "second"]

    @property
    def train_pairs(self) -> Part:
        """Reference to `train.parquet`: the human preference pairs for training."""
        return Part(stage=self, of="train")

    @property
    def second_pairs(self) -> Part:
        """Reference to `second.parquet`: the human preference pairs for a second reward model."""
        return Part(stage=self, of="second")

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Read, validate and split the rows of an experiment, and write a file for each part."""
        tokenizer = load_tokenizer(locate_model_folder(input_paths["base"]))
        rows, note = read_source_rows(self, tokenizer), progress_listener.get().on_message
        policy = self.on_bad_row or ("drop" if self.format == "hh-rlhf" else "error")
        if rows.bad:
            (job.out / "bad_rows.jsonl").unlink(missing_ok=True)
            append_jsonl(job.out / "bad_rows.jsonl", [asdict(row) for row in rows.bad])
            if policy == "error":
                raise_for_bad_rows(rows.bad, rows.total_count)
        split = split_source_rows(self, rows)
        figures = compute_data_statistics(self, rows, split, tokenizer)
        for name in ("train", "test", "demonstrations", "second")[: 4 if self.second_rows else 3]:
            part: list[Any] = getattr(split, name)
            count = getattr(self, f"{name.removesuffix('s')}_rows")
            if count is not None and len(part) < count:
                note(f"data.{name}: {len(part)} rows, where {count} were asked for: there are no more")
            rows_with_tokens = add_token_columns([asdict(row) for row in part], tokenizer)
            write_table(job.out / f"{name}.parquet", rows_with_tokens, tokenizer=compute_tokenization_digest(tokenizer))
        for name in (*self.train, *self.test, *self.demonstrations, *self.second):
            if name.startswith("hub:") and self.revision is None:
                note(f"{name} is read as it is today; data.revision=COMMIT keeps to one state of it")
        if rows.bad:
            note(f"{len(rows.bad)} of {rows.total_count} rows dropped, listed in {job.out / 'bad_rows.jsonl'}")
        for line in describe_data_statistics(figures):
            note(line)
        job.finish_stage(**figures)
