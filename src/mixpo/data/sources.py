"""Readers of preference and demonstration rows: local files, Hugging Face Hub, raw HH-RLHF and TL;DR formats.

An invalid row does not stop reading: readers return it beside the valid rows and leave the decision to the caller.
An unreadable file raises `InputError`.
"""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mixpo.data.errors import InputError, extract_first_line
from mixpo.data.rows import (
    FIX_HINT,
    BadRow,
    Demonstration,
    Message,
    Preference,
    Prompt,
    RowError,
    describe_type,
    list_demonstration_columns,
    make_excerpt,
    parse_demonstration,
    parse_preference,
    read_text_field,
    split_filled_columns,
)

Format = Literal["preference", "hh-rlhf", "tldr"]
Record = dict[str, object]
Records = Iterator[tuple[int, Record | RowError]]
Row = TypeVar("Row", Demonstration, Preference)


class ParsedRows(NamedTuple, Generic[Row]):
    """Result of reading a source: valid rows, bad rows, and the names of the columns that were used and ignored."""

    rows: list[Row]
    bad_rows: list[BadRow]
    used_columns: list[str]
    """Non-empty columns that the rows are parsed from, in order of appearance."""
    ignored_columns: list[str]
    """Non-empty columns that no row is parsed from, in order of appearance."""


class RowParser(NamedTuple, Generic[Row]):
    """Parser of one row format: a function from a record to a row, and one that names the columns it reads."""

    parse: Callable[[Record], Row]
    columns: Callable[[Record], Sequence[str]]


PromptCheck = Callable[[Prompt], None]
"""Function that raises `RowError` for an unusable prompt, such as one too long for the model."""


def accept_any_prompt(prompt: Prompt) -> None:
    """Accept every prompt: a prompt check that never raises `RowError`."""


def read_preferences(
    path: Path, row_format: Format, check_prompt: PromptCheck = accept_any_prompt
) -> ParsedRows[Preference]:
    """Read preference pairs of a local file; rows that are invalid or fail `check_prompt` are returned as bad rows."""
    parser = _make_preference_parser(row_format, path.absolute().parent.name)
    return _parse_records(str(path), read_records(path), parser, check_prompt)


def read_demonstrations(path: Path, check_prompt: PromptCheck = accept_any_prompt) -> ParsedRows[Demonstration]:
    """Read demonstrations of a local file; rows that are invalid or fail `check_prompt` are returned as bad rows."""
    return _parse_records(str(path), read_records(path), _DEMONSTRATION_PARSER, check_prompt)


def read_hub_preferences(
    hub_name: str,
    row_format: Format,
    check_prompt: PromptCheck = accept_any_prompt,
    *,
    split: str,
    data_dir: str | None = None,
    revision: str | None = None,
) -> ParsedRows[Preference]:
    """Read preference pairs of a Hugging Face data set; invalid rows are returned; `data_dir` selects a subset."""
    records = read_hub_records(hub_name, split=split, data_dir=data_dir, revision=revision)
    parser = _make_preference_parser(row_format, data_dir or "")
    return _parse_records(_format_hub_name(hub_name, split, data_dir), records, parser, check_prompt)


def read_hub_demonstrations(
    hub_name: str,
    check_prompt: PromptCheck = accept_any_prompt,
    *,
    split: str,
    data_dir: str | None = None,
    revision: str | None = None,
) -> ParsedRows[Demonstration]:
    """Read demonstrations of a Hugging Face data set; invalid rows are returned as bad rows."""
    records = read_hub_records(hub_name, split=split, data_dir=data_dir, revision=revision)
    return _parse_records(_format_hub_name(hub_name, split, data_dir), records, _DEMONSTRATION_PARSER, check_prompt)


def _parse_records(source: str, records: Records, parser: RowParser[Row], check_prompt: PromptCheck) -> ParsedRows[Row]:
    """Parse records to `ParsedRows`; one that is invalid or fails `check_prompt` is returned as a `BadRow`."""
    rows: list[Row] = []
    bad_rows: list[BadRow] = []
    columns: tuple[dict[str, None], dict[str, None]] = {}, {}
    for number, record in records:
        try:
            if isinstance(record, RowError):
                raise record
            for column_names, names in zip(columns, split_filled_columns(record, parser.columns(record)), strict=True):
                column_names.update(dict.fromkeys(names))
            row = parser.parse(record)
            check_prompt(row.prompt)
            rows.append(row)
        except RowError as error:
            bad_rows.append(BadRow(source, number, error.field, error.problem))
    return ParsedRows(rows, bad_rows, *map(list, columns))


# Raw formats


def parse_hh_rlhf(record: Record) -> Preference:
    r"""Parse a raw HH-RLHF row (Bai et al. 2022): `chosen` and `rejected` dialogues that end with the completions.

    Dialogues are split at `\n\nHuman:` and `\n\nAssistant:` only, and turns are stripped. Consecutive turns of one
    speaker are joined by an empty line, because chat templates require alternating roles.
    """
    return parse_preference(
        {side: _split_hh_rlhf_dialogue(side, read_text_field(record, side)) for side in ("chosen", "rejected")}
    )


HH_RLHF_SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
"""Folders of HH-RLHF, from which a row's category is inferred, since the rows have no such field."""


def _infer_hh_rlhf_category(folder_name: str, row_format: str) -> str | None:
    """Category of an HH-RLHF subset, `helpful` or `harmless`; None for other folders and formats."""
    return folder_name.partition("-")[0] if row_format == "hh-rlhf" and folder_name in HH_RLHF_SUBSETS else None


def _make_preference_parser(row_format: Format, folder_name: str) -> RowParser[Preference]:
    """Parser of a row format; in a folder of HH-RLHF such as `helpful-base` it also sets the rows' category."""
    parser, category = _PREFERENCE_PARSERS[row_format], _infer_hh_rlhf_category(folder_name, row_format)
    if category is None:
        return parser
    return parser._replace(parse=lambda record: replace(parser.parse(record), category=category))


def _split_hh_rlhf_dialogue(field: str, text: str) -> list[Message]:
    """Split a raw HH-RLHF dialogue into messages. Raises `RowError` if it does not begin with the user's turn."""
    start, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if start or turns[0] != "Human":
        raise RowError(field, f"begins with {make_excerpt(text)}; expected '\\n\\nHuman:'; {FIX_HINT}")
    roles = {"Human": "user", "Assistant": "assistant"}
    speakers_and_texts = zip(turns[::2], turns[1::2], strict=True)
    return [
        Message(role=roles[speaker], content="\n\n".join(text.strip() for _, text in group).strip())
        for speaker, group in groupby(speakers_and_texts, key=lambda turn: turn[0])
    ]


_TLDR_POST = re.compile(r"SUBREDDIT:.*TITLE:.*POST:", flags=re.DOTALL)


def parse_tldr(record: Record) -> Preference:
    """Parse a TL;DR comparison (Stiennon et al. 2020): `prompt` (a Reddit post), `chosen`, `rejected` (summaries).

    The prompt becomes one user message: the post, an empty line and the paper's instruction "TL;DR:". That prefix and
    surrounding whitespace are removed from the summaries.
    """
    post = read_text_field(record, "prompt").strip()
    if not _TLDR_POST.match(post):
        raise RowError("prompt", f"is {make_excerpt(post)}; expected 'SUBREDDIT: … TITLE: … POST: …'; {FIX_HINT}")
    request = Message(role="user", content=f"{post.removesuffix('TL;DR:').rstrip()}\n\nTL;DR:")
    sides = {
        side: read_text_field(record, side).strip().removeprefix("TL;DR:").strip() for side in ("chosen", "rejected")
    }
    return parse_preference({"prompt": [request], **sides})


_PREFERENCE_PARSERS: dict[Format, RowParser[Preference]] = {
    "preference": RowParser(parse_preference, lambda _: ("prompt", "chosen", "rejected", "system", "category")),
    "hh-rlhf": RowParser(parse_hh_rlhf, lambda _: ("chosen", "rejected")),
    "tldr": RowParser(parse_tldr, lambda _: ("prompt", "chosen", "rejected")),
}
_DEMONSTRATION_PARSER = RowParser(parse_demonstration, list_demonstration_columns)


def guess_format(record: Record) -> Format | Literal["demonstrations"]:
    """Guess the row format, by name, from a record's fields; `demonstrations` without `chosen` and `rejected`."""
    chosen, prompt = record.get("chosen"), record.get("prompt")
    if chosen is None and record.get("rejected") is None:
        return "demonstrations"
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):
        return "hh-rlhf"
    if isinstance(prompt, str) and _TLDR_POST.match(prompt.strip()):
        return "tldr"
    return "preference"


# Local files


def read_records(path: Path) -> Records:
    """Yield (line or row number, record) of a data file; an invalid record is yielded as a `RowError`."""
    _require_file(path)
    return _require_records(path, _READERS[_find_suffix(path)](path))


def is_data_file(file_name: str) -> bool:
    """True if a file name has a suffix of the supported formats, such as `.jsonl.gz`; the file is not opened."""
    return any(file_name.lower().endswith(ending) for ending in _READERS)


def _find_suffix(path: Path) -> str:
    """Suffix of a data file, such as `.jsonl.gz`. Raises `InputError` if it is not supported."""
    for ending in _READERS:
        if path.name.lower().endswith(ending):
            return ending
    raise InputError(f"{path}: unsupported suffix {path.suffix!r}; expected {', '.join(_READERS)}; convert the file")


def compute_source_identity(path: Path, row_format: str) -> str:
    """Identity of a file's rows as text: digest of its content, its suffix and the category of its HH-RLHF subset."""
    category = _infer_hh_rlhf_category(path.absolute().parent.name, row_format)
    return f"{compute_content_digest([path])}{_find_suffix(path)}{category or ''}"


def expand_home(path_text: str) -> Path:
    """Path with `~` and `~user` expanded. Raises `InputError` if there is no such user."""
    try:
        return Path(path_text).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{path_text}: found no home folder of that user; expected an existing user; write the full path"
        ) from error


def compute_content_digest(paths: Sequence[Path]) -> str:
    """Digest of the contents of files in this order, whatever their names: 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    for path in paths:
        _require_file(path)
        with _convert_read_errors(path):
            digest.update(compute_file_digest(path))
    return digest.hexdigest()[:16]


def compute_file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content, 32 bytes, cached by path, size and modification time."""
    status = path.stat()
    return _hash_file(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hash_file(path: Path, size: int, modified_ns: int) -> bytes:
    """SHA-256 of a file's content; size and modification time are only the cache's key."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _require_file(path: Path) -> None:
    """Raise `InputError`, suggesting similar names in the folder, unless the path is a regular file."""
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such file, and no folder '{path.parent}'; check the path")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file; it holds {_describe_folder(path)}")
    if path.is_symlink() or path.exists():
        problem = "is a pipe or a device" if path.exists() else "is a link to a missing file"
        raise InputError(f"{path}: {problem}; expected a regular file, because it is read more than once")
    near = get_close_matches(path.name, _list_file_names(path.parent), n=3)
    hint = (
        f"did you mean {', '.join(map(repr, near))}?" if near else f"the folder holds {_describe_folder(path.parent)}"
    )
    raise InputError(f"{path}: no such file; {hint}")


def _list_file_names(folder: Path) -> list[str]:
    """Sorted names of all entries of a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def _describe_folder(folder: Path) -> str:
    """First ten names in a folder as text for error messages; `nothing` if it is empty."""
    names = _list_file_names(folder)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more or "nothing"


@contextmanager
def _convert_read_errors(path: Path) -> Iterator[None]:
    """Context manager: raise `InputError` in place of errors of reading or decoding a file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read: {extract_first_line(error, None)}; check that the file is complete"
        ) from error


def _require_records(path: Path, records: Records) -> Records:
    """Yield the same records. Raises `InputError`, when iterated, if there are none."""
    first = next(records, None)
    if first is None:
        raise InputError(f"{path}: has no rows; expected at least one; check the file")
    yield from chain([first], records)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of a UTF-8 file, split at line feeds only: other separators may be part of a text."""
    with (
        _convert_read_errors(path),
        gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream,
    ):
        for number, line in enumerate(stream, start=1):
            yield number, _decode_utf8_line(path, number, line)


def _decode_utf8_line(path: Path, line_number: int, line: bytes) -> str:
    """Decode one line of UTF-8. Raises `InputError` with the position of an invalid byte."""
    try:
        return line.decode("utf-8-sig" if line_number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise InputError(f"{path}:{line_number}: is not UTF-8: {problem}; save the file as UTF-8") from error


def _read_jsonl_records(path: Path) -> Records:
    """Yield (line number, record or `RowError`) of a JSON Lines file; blank lines are skipped."""
    for number, line in _read_lines(path):
        if line.strip():
            yield number, _parse_record_or_error(line)


def _parse_record_or_error(line: str) -> Record | RowError:
    """Parse one line of JSON Lines to a record; an error is returned as a `RowError`, not raised."""
    try:
        return _require_record(json.loads(line, object_pairs_hook=_build_json_object))
    except json.JSONDecodeError as error:
        return RowError("", f"is not JSON: {error.msg} at column {error.colno}; {FIX_HINT}")
    except (ValueError, RecursionError) as error:
        return RowError("", f"is not JSON: {extract_first_line(error, None)}; {FIX_HINT}")


def _require_record(value: object) -> Record | RowError:
    """The value itself if it is a record or an error; a `RowError`, returned, for any other JSON value."""
    if isinstance(value, dict | RowError):
        return value
    return RowError("", f"is {describe_type(value)}; expected an object; {FIX_HINT}")


def _build_json_object(keys_and_values: list[tuple[str, object]]) -> Record | RowError:
    """A JSON object of its keys and values; a repeated key, here or in a nested object, returns a `RowError`."""
    fields = dict(keys_and_values)
    if len(fields) < len(keys_and_values):
        return RowError(
            _find_repeated_name([key for key, _ in keys_and_values]),
            f"occurs twice in one object; expected one value; {FIX_HINT}",
        )
    values = (item for value in fields.values() for item in (value if isinstance(value, list) else [value]))
    return next((item for item in values if isinstance(item, RowError)), fields)


def _find_repeated_name(names: Sequence[str]) -> str:
    """First name that occurs a second time; there must be one."""
    return next(name for position, name in enumerate(names) if name in names[:position])


def _read_json_records(path: Path) -> Records:
    """Yield (row number, record or `RowError`) of a JSON file, which must hold a list; else raises `InputError`."""
    text = "".join(line for _, line in _read_lines(path))
    try:
        rows = json.loads(text, object_pairs_hook=_build_json_object) if text.strip() else []
    except (ValueError, RecursionError) as error:
        hint = "name a file with one object per line .jsonl"
        raise InputError(f"{path}: is not JSON: {extract_first_line(error, None)}; {hint}") from error
    if not isinstance(rows, list):
        kind = "an object" if isinstance(rows, RowError) else describe_type(rows)
        raise InputError(f"{path}: contains {kind}; expected a list of objects")
    yield from enumerate(map(_require_record, rows), start=1)


def _read_csv_records(path: Path) -> Records:
    """Yield (number of the first line, record or `RowError`) of a CSV file's rows; blank ones are skipped."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _read_lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            name = _find_repeated_name(header)
            raise InputError(
                f"{path}:1: the header has two columns {name!r}; expected different names; rename one of them"
            )
        row_start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                problem = f"has {len(row)} columns; expected {len(header)} as in the header; quote texts with commas"
                yield row_start, RowError("", problem)
            elif row:
                yield row_start, dict(zip(header, row, strict=True))
            row_start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not CSV: {error}; fix the quotes around this line") from error


def _read_parquet_records(path: Path) -> Records:
    """Yield (row number, record) of a Parquet file."""
    with _convert_read_errors(path), pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl_records,
    ".jsonl.gz": _read_jsonl_records,
    ".json": _read_json_records,
    ".json.gz": _read_json_records,
    ".csv": _read_csv_records,
    ".csv.gz": _read_csv_records,
    ".parquet": _read_parquet_records,
}


# The Hugging Face Hub


def read_hub_records(hub_name: str, *, split: str, data_dir: str | None = None, revision: str | None = None) -> Records:
    """Yield (row number, record) of a Hugging Face data set, downloaded once into the cache of `datasets`."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError(f"Hub data set '{hub_name}' needs the package 'datasets'; pip install 'mixpo[hub]'") from error
    try:
        dataset = load_dataset(hub_name, data_dir=data_dir, split=split, revision=revision)
    except Exception as error:  # load_dataset raises whatever its builders, filesystems and HTTP client do
        raise InputError(
            f"Hub data set '{_format_hub_name(hub_name, split, data_dir)}' cannot be loaded: {type(error).__name__}: "
            f"{extract_first_line(error, None)}; check its name, split, data_dir and the network, or name a local file"
        ) from error
    return enumerate(map(dict, dataset), start=1)


def _format_hub_name(hub_name: str, split: str, data_dir: str | None) -> str:
    """Name of a Hugging Face data set in messages: `name/data_dir[split]`."""
    return f"{hub_name}/{data_dir}[{split}]" if data_dir else f"{hub_name}[{split}]"
