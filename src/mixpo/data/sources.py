"""Where rows come from: local files, the Hugging Face Hub, and the raw formats of HH-RLHF and TL;DR.

A row that cannot be used never stops the reading: readers return it beside the good rows, and the caller decides.
A file that cannot be read raises `InputError`.
"""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mixpo.data.errors import InputError
from mixpo.data.rows import (
    FIX,
    BadRow,
    Demonstration,
    Message,
    Preference,
    Prompt,
    RowError,
    columns_with_content,
    demonstration_columns,
    excerpt,
    kind_of,
    parse_demonstration,
    parse_preference,
    preference_columns,
    read_text_field,
)

Format = Literal["preference", "hh-rlhf", "tldr"]
Record = dict[str, object]
Records = Iterator[tuple[int, Record | RowError]]
Row = TypeVar("Row", Demonstration, Preference)


class Reading(NamedTuple, Generic[Row]):
    """What a source holds: its rows, the rows that cannot be used, and the columns that were read and that were not."""

    rows: list[Row]
    bad: list[BadRow]
    used: list[str]
    """In order of appearance."""
    ignored: list[str]


class Parser(NamedTuple, Generic[Row]):
    """How a record becomes a row, and the columns that it reads of it."""

    parse: Callable[[Record], Row]
    columns: Callable[[Record], Sequence[str]]


Check = Callable[[Prompt], None]
"""Raises `RowError` for a prompt that cannot be used, too long for the model say."""


def any_prompt(prompt: Prompt) -> None:
    """The check that lets every prompt through."""


def read_preferences(path: Path, format: Format, check: Check = any_prompt) -> Reading[Preference]:
    """Read a file's preferences, and its rows that are none."""
    reading = _parsed(str(path), read_records(path), _PREFERENCE[format], check)
    return _with_category(reading, _subset_of(path, format))


def read_demonstrations(path: Path, check: Check = any_prompt) -> Reading[Demonstration]:
    """Read a file's demonstrations, and its rows that are none."""
    return _parsed(str(path), read_records(path), _DEMONSTRATION, check)


def read_hub_preferences(
    name: str,
    format: Format,
    check: Check = any_prompt,
    *,
    split: str,
    data_dir: str | None = None,
    revision: str | None = None,
) -> Reading[Preference]:
    """Read the preferences of a Hub data set; `Anthropic/hh-rlhf` keeps its subsets apart by `data_dir`."""
    records = hub_records(name, split=split, data_dir=data_dir, revision=revision)
    reading = _parsed(_hub_name(name, split, data_dir), records, _PREFERENCE[format], check)
    return _with_category(reading, _category_of(data_dir or "", format))


def read_hub_demonstrations(
    name: str, check: Check = any_prompt, *, split: str, data_dir: str | None = None, revision: str | None = None
) -> Reading[Demonstration]:
    """Read the demonstrations of a Hub data set."""
    records = hub_records(name, split=split, data_dir=data_dir, revision=revision)
    return _parsed(_hub_name(name, split, data_dir), records, _DEMONSTRATION, check)


def _parsed(file: str, records: Records, parser: Parser[Row], check: Check) -> Reading[Row]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    columns: tuple[dict[str, None], dict[str, None]] = {}, {}
    for number, record in records:
        try:
            if isinstance(record, RowError):
                raise record
            for seen, names in zip(columns, columns_with_content(record, parser.columns(record)), strict=True):
                seen.update(dict.fromkeys(names))
            row = parser.parse(record)
            check(row.prompt)
            rows.append(row)
        except RowError as error:
            bad.append(BadRow(file, number, error.field, error.problem))
    return Reading(rows, bad, *map(list, columns))


# Raw formats


def parse_hh_rlhf(record: Record) -> Preference:
    r"""Read a raw HH-RLHF row: `chosen` and `rejected`, each a dialogue that ends with its completion. Bai et al. 2022.

    A dialogue is split at `\n\nHuman:` and `\n\nAssistant:` and nowhere else, and turns are stripped. Turns that follow
    each other from one side are one turn, joined by an empty line: chat templates want roles to alternate, and the
    second is the same speaker going on.
    """
    return parse_preference({side: _dialogue(side, read_text_field(record, side)) for side in ("chosen", "rejected")})


HH_RLHF_SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
"""The folders of HH-RLHF, which say what kind of prompt a row has; the rows themselves do not."""


def _subset_of(path: Path, format: str) -> str | None:
    return _category_of(path.absolute().parent.name, format)


def _category_of(folder: str, format: str) -> str | None:
    return folder.partition("-")[0] if format == "hh-rlhf" and folder in HH_RLHF_SUBSETS else None


def _with_category(reading: Reading[Preference], category: str | None) -> Reading[Preference]:
    if category is None:
        return reading
    return reading._replace(rows=[replace(row, category=category) for row in reading.rows])


def _dialogue(field: str, text: str) -> list[Message]:
    start, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if start or turns[0] != "Human":
        raise RowError(field, f"begins with {excerpt(text)}; expected '\\n\\nHuman:'; {FIX}")
    spoken = zip(turns[::2], turns[1::2], strict=True)
    return [
        Message(role={"Human": "user", "Assistant": "assistant"}[speaker], content=_joined(text for _, text in group))
        for speaker, group in groupby(spoken, key=lambda turn: turn[0])
    ]


def _joined(turns: Iterable[str]) -> str:
    return "\n\n".join(turn.strip() for turn in turns).strip()


_TLDR = re.compile(r"SUBREDDIT:.*TITLE:.*POST:", flags=re.DOTALL)


def parse_tldr(record: Record) -> Preference:
    """Read a TL;DR comparison: `prompt` (a Reddit post), `chosen`, `rejected` (summaries). Stiennon et al. 2020.

    The prompt becomes one user message: the post, an empty line and the instruction "TL;DR:", which is how the paper
    asks. The summaries lose that prefix, which the prompt now has, and the space around them.
    """
    post = read_text_field(record, "prompt").strip()
    if not _TLDR.match(post):
        raise RowError("prompt", f"is {excerpt(post)}; expected 'SUBREDDIT: … TITLE: … POST: …'; {FIX}")
    asked = Message(role="user", content=f"{post.removesuffix('TL;DR:').rstrip()}\n\nTL;DR:")
    sides = {
        side: read_text_field(record, side).strip().removeprefix("TL;DR:").strip() for side in ("chosen", "rejected")
    }
    return parse_preference({"prompt": [asked], **sides})


_PREFERENCE: dict[Format, Parser[Preference]] = {
    "preference": Parser(parse_preference, preference_columns),
    "hh-rlhf": Parser(parse_hh_rlhf, lambda _: ("chosen", "rejected")),
    "tldr": Parser(parse_tldr, lambda _: ("prompt", "chosen", "rejected")),
}
_DEMONSTRATION = Parser(parse_demonstration, demonstration_columns)


def guess_format(record: Record) -> Literal["preference", "hh-rlhf", "tldr", "demonstrations"]:
    """Guess from a record's fields what kind of row it is; what has no `chosen` is a demonstration."""
    chosen, prompt = record.get("chosen"), record.get("prompt")
    if chosen is None and record.get("rejected") is None:
        return "demonstrations"
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):
        return "hh-rlhf"
    if isinstance(prompt, str) and _TLDR.match(prompt.strip()):
        return "tldr"
    return "preference"


# Local files


def read_records(path: Path) -> Records:
    """Read a file's rows with their numbers: lines in JSON Lines and CSV (where the row begins), rows elsewhere.

    A row that is no object, a line that is no JSON and a CSV row with too few or too many columns come as `RowError`.
    """
    _must_be_file(path)
    return _not_empty(path, _READERS[_ending(path)](path))


def is_data_file(name: str) -> bool:
    """Whether a name has the end of a file of rows."""
    return any(name.lower().endswith(ending) for ending in _READERS)


def _ending(path: Path) -> str:
    """The end of a file's name that says how it is read."""
    for ending in _READERS:
        if path.name.lower().endswith(ending):
            return ending
    raise InputError(f"{path}: unknown kind of file {path.suffix!r}; expected {', '.join(_READERS)}; convert the file")


def source_identity(path: Path, format: str) -> str:
    """All that a file's rows depend on: what it holds, and what its path says, its kind and HH-RLHF's subset."""
    return f"{content_digest([path])}{_ending(path)}{_subset_of(path, format) or ''}"


def local_path(name: str) -> Path:
    """The path that a text names, `~` and `~user` written out. Raises `InputError` on a user that is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: found no home folder of that user; expected a path; write it out") from error


def content_digest(paths: Sequence[Path]) -> str:
    """Digest what files hold, in this order and whatever their names: 16 hex digits of SHA-256."""
    whole = hashlib.sha256()
    for path in paths:
        _must_be_file(path)
        with _readable(path):
            whole.update(file_digest(path))
    return whole.hexdigest()[:16]


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file, remembered while its size and time of change stay as they are."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _must_be_file(path: Path) -> None:
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such file, and no folder '{path.parent}'; check the path")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file; it holds {_listing(path)}")
    if path.is_symlink() or path.exists():
        found = "is a pipe or a device" if path.exists() else "is a link to a file that is not there"
        raise InputError(f"{path}: {found}; expected a file, which is read more than once")
    near = get_close_matches(path.name, _names(path.parent), n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"the folder holds {_listing(path.parent)}"
    raise InputError(f"{path}: no such file; {hint}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _listing(folder: Path) -> str:
    names = _names(folder)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more or "nothing"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a broken file raises into `InputError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}; check that the file is whole") from error


def _not_empty(path: Path, records: Records) -> Records:
    first = next(records, None)
    if first is None:
        raise InputError(f"{path}: has no rows; expected at least one; check the file")
    yield from chain([first], records)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read lines of UTF-8; only a line feed ends one, so that other separators may stand in a text."""
    with _readable(path), gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, _decoded(path, number, line)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise InputError(f"{path}:{number}: is not UTF-8: {found}; save the file as UTF-8") from error


def _jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        if line.strip():
            yield number, _object_in(line)


def _object_in(line: str) -> Record | RowError:
    try:
        return _object(json.loads(line, object_pairs_hook=_fields))
    except json.JSONDecodeError as error:
        return RowError("", f"is not JSON: {error.msg} at column {error.colno}; {FIX}")
    except (ValueError, RecursionError) as error:
        return RowError("", f"is not JSON: {_first_line(error)}; {FIX}")


def _object(value: object) -> Record | RowError:
    if isinstance(value, dict | RowError):
        return value
    return RowError("", f"is {kind_of(value)}; expected an object; {FIX}")


def _fields(pairs: list[tuple[str, object]]) -> Record | RowError:
    """An object of JSON, or what is wrong with it or with one in it: a key that stands there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        return RowError(_repeated([key for key, _ in pairs]), f"stands twice in one object; expected one value; {FIX}")
    within = (item for value in fields.values() for item in (value if isinstance(value, list) else [value]))
    return next((item for item in within if isinstance(item, RowError)), fields)


def _repeated(names: Sequence[str]) -> str:
    """The first name that stands there again."""
    return next(name for place, name in enumerate(names) if name in names[:place])


def _json(path: Path) -> Records:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text, object_pairs_hook=_fields) if text.strip() else []
    except (ValueError, RecursionError) as error:
        hint = "a file with one object a line is named .jsonl"
        raise InputError(f"{path}: is not JSON: {_first_line(error)}; {hint}") from error
    if not isinstance(rows, list):
        kind = "an object" if isinstance(rows, RowError) else kind_of(rows)
        raise InputError(f"{path}: holds {kind}; expected a list of objects")
    yield from enumerate(map(_object, rows), start=1)


def _csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            name = _repeated(header)
            raise InputError(f"{path}:1: the header has two columns {name!r}; expected each once; rename one of them")
        begin = reader.line_num + 1
        for row in reader:
            if row:
                yield begin, _cells(header, row)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not CSV: {error}; fix the quotes around this line") from error


def _cells(header: list[str], row: list[str]) -> Record | RowError:
    if len(row) != len(header):
        return RowError("", f"has {len(row)} columns; expected {len(header)} as in the header; quote texts with commas")
    return dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Records:
    with _readable(path), pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".parquet": _parquet,
}


# The Hugging Face Hub


def hub_records(name: str, *, split: str, data_dir: str | None = None, revision: str | None = None) -> Records:
    """Read the rows of a Hub data set with their numbers; downloaded once, then from the cache of `datasets`."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError(f"Hub data set '{name}' needs the package 'datasets'; pip install 'mixpo[hub]'") from error
    try:
        dataset = load_dataset(name, data_dir=data_dir, split=split, revision=revision)
    except Exception as error:  # load_dataset raises whatever its builders, filesystems and HTTP client do
        raise InputError(
            f"Hub data set '{_hub_name(name, split, data_dir)}' cannot be loaded: {type(error).__name__}: "
            f"{_first_line(error)}; check its name, split, data_dir and the network, or name a local file"
        ) from error
    return enumerate(map(dict, dataset), start=1)


def _hub_name(name: str, split: str, data_dir: str | None) -> str:
    return f"{name}/{data_dir}[{split}]" if data_dir else f"{name}[{split}]"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Rows that stages hand to each other


def write_rows(path: Path, rows: Sequence[Demonstration] | Sequence[Preference]) -> None:
    """Write rows to Parquet; the prompts are all text or all messages, so that a file has one type of prompt."""
    if not rows:
        raise InputError(f"{path}: no rows to write; expected at least one")
    as_text = [isinstance(row.prompt, str) for row in rows]
    if len(set(as_text)) > 1:
        raise InputError(
            f"{path}: {sum(as_text)} prompts are text and {len(rows) - sum(as_text)} are lists of messages; "
            "expected one kind in a file; write every prompt as messages"
        )
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    prompt = pa.string() if as_text[0] else pa.list_(message)
    schema = pa.schema([(field.name, prompt if field.name == "prompt" else pa.string()) for field in fields(rows[0])])
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), path)


def read_preference_rows(path: Path) -> list[Preference]:
    """Read what `write_rows` wrote, exactly."""
    return _read_rows(path, Preference)


def read_demonstration_rows(path: Path) -> list[Demonstration]:
    """Read what `write_rows` wrote, exactly."""
    return _read_rows(path, Demonstration)


def _read_rows(path: Path, kind: type[Row]) -> list[Row]:
    _must_be_file(path)
    expected = [field.name for field in fields(kind)]
    with _readable(path), pq.ParquetFile(path) as file:
        if file.schema_arrow.names != expected:
            raise InputError(f"{path}: has columns {file.schema_arrow.names}; expected {expected}")
        return [kind(**row) for row in file.read().to_pylist()]
