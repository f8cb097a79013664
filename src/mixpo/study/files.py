"""A study's files: judgements out and in as CSV or JSON Lines, and what a closed study leaves for the report."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixpo import __version__
from mixpo.data.errors import InputError
from mixpo.study.findings import FORMAT
from mixpo.study.plan import CHOICES, COMMENT_LENGTH, IDLE_SECONDS, REASONS, comment_from
from mixpo.study.store import ClosedError, Question, Said, Store, private_folder
from mixpo.study.tables import StudyRow

COLUMNS = ("annotator", "question", "digest", "choice", "reason", "comment", "seconds", "idle", "at")
"""Of an export; the digest is of the question and its texts, and only this study's store can make it."""
WHOLE = re.compile(r"[1-9][0-9]{0,8}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
ACTIVE = ("=", "+", "-", "@", "\t", "\r", "'")
"""How a cell begins that a spreadsheet would take for more than text, and the mark that tells it so."""
LARGEST = 2**28
"""Bytes of a file that is taken in: that many no study exports."""
_LISTED = 10


def export(store: Store, study: StudyRow, path: Path) -> int:
    """Write all judgements, without a word of arms; how many."""
    rows = [_row(study, one) for one in store.questions() if one.said is not None]
    write = _csv if _form(path) == "csv" else _jsonl
    _write(path, write(rows))
    return len(rows)


def take_in(store: Store, study: StudyRow, path: Path) -> tuple[int, int]:
    """Keep the judgements of an export of this study, all or nothing: how many there are, how many of them are new."""
    asked = {(one.annotator, one.number): one for one in store.questions()}
    given, bad = [], []
    for line, row in _read(path):
        try:
            given.append(_judgement(study, asked, row))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            problem = f"no {error} there" if isinstance(error, KeyError) else str(error)
            if len(problem) > 400:  # of a value that may be as long as the file
                problem = f"{problem[:200]}…{problem[-200:]}"
            bad.append(f"{path}:{line}: {problem}")
    if not bad:
        times = Counter(one[:2] for one in given)
        bad = [f"{path}: found question {n} of {who} twice; expected it once" for (who, n), k in times.items() if k > 1]
    if bad:
        more = [f"... and {len(bad) - _LISTED} more"] if len(bad) > _LISTED else []
        raise InputError("\n".join([*bad[:_LISTED], *more, "nothing was imported; export again, or correct the file"]))
    try:
        return len(given), store.add(given)
    except ClosedError:
        raise InputError(f"{store.name}: found a study that is closed; nothing can be imported any more") from None


def write_closed(store: Store, study: StudyRow, folder: Path) -> Path:
    """Write what the report reads of a closed study: `judgements.jsonl`, then `closed.json`."""
    arms = (study.first, study.second)
    rows = []
    for one in store.questions():
        if one.said is not None:
            left, right = arms[::-1] if one.swapped else arms
            better = {"left": left, "right": right, "tie": "tie", "skip": None}[one.said.choice]
            rows.append(
                {
                    **{"annotator": one.annotator, "question": one.number, "prompt": one.item.number},
                    **{"category": one.item.category, "left": left, "right": right, "better": better},
                    **vars(one.said),
                }
            )
    private_folder(folder)
    _write(folder / "judgements.jsonl", _jsonl(rows))
    content = {
        "format": FORMAT,
        "mixpo": __version__,
        "arms": arms,
        "seed": study.seed,
        "draw": study.draw,
        "secret": study.secret,
        "prompts": study.prompts,
        "content": study.content,
        "same": [{"prompt": number, "category": category} for number, category in json.loads(study.same)],
        "began": study.began,
        "closed": study.closed,
        "annotators": [one.name for one in store.annotators()],
        "guidelines": study.guidelines,
    }
    _write(folder / "closed.json", json.dumps(content, indent=2) + "\n")
    return folder / "closed.json"


def _row(study: StudyRow, one: Question) -> dict[str, Any]:
    assert one.said is not None
    return {"annotator": one.annotator, "question": one.number, "digest": one.digest(study.secret), **vars(one.said)}


def _judgement(
    study: StudyRow, asked: Mapping[tuple[str, int], Question], row: Mapping[str, Any]
) -> tuple[str, int, Said]:
    """What a row says, or ValueError on what does not fit the study."""
    if not WHOLE.fullmatch(str(row["question"])):
        raise ValueError(f"found question {row['question']!r}; expected a whole number from 1")
    who, number = str(row["annotator"]), int(row["question"])
    question = asked.get((who, number))
    if question is None:
        raise ValueError(f"found question {number} of {who!r}; expected one of this study")
    if row["digest"] != (expected := question.digest(study.secret)):
        raise ValueError(f"found digest {row['digest']!r}; expected {expected}: another study, or another question")
    if wrong := [name for name in ("choice", "reason", "comment", "at") if not isinstance(row[name], str)]:
        raise ValueError(f"found {wrong[0]} {row[wrong[0]]!r}; expected text")
    if row["choice"] not in CHOICES:
        raise ValueError(f"found choice {row['choice']!r}; expected one of {', '.join(CHOICES)}")
    if row["reason"] not in (REASONS if row["choice"] == "skip" else ("",)):
        expected = ", ".join(REASONS) if row["choice"] == "skip" else "none"
        raise ValueError(f"found reason {row['reason']!r} of choice {row['choice']}; expected {expected}")
    if (comment := row["comment"]) != comment_from(comment) or len(comment) > COMMENT_LENGTH or not _encodes(comment):
        raise ValueError(
            f"found a comment of {len(comment)} characters; expected {COMMENT_LENGTH} at most, without blanks around "
            "it, zero characters and halves of surrogate pairs"
        )
    if not TIME.fullmatch(row["at"]):
        raise ValueError(f"found at {row['at']!r}; expected a time such as 2026-11-22T12:00:00+00:00")
    idle = str(row["idle"]).capitalize()  # spreadsheets write TRUE
    if idle not in ("True", "False") or not 0 <= float(row["seconds"]) <= IDLE_SECONDS:
        raise ValueError(
            f"found seconds {row['seconds']!r} and idle {row['idle']!r}; expected 0 to {IDLE_SECONDS:g}, True or False"
        )
    return who, number, Said(row["choice"], row["reason"], comment, float(row["seconds"]), idle == "True", row["at"])


def _encodes(text: str) -> bool:
    return text == text.encode(errors="replace").decode()


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of an export with their line or row."""
    form = _form(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError(f"{path}: found more than {LARGEST:,} bytes; expected what --export writes")
        text = content.decode("utf-8-sig")
        if form == "jsonl":
            return [(line, json.loads(one)) for line, one in enumerate(text.split("\n"), start=1) if one.strip()]
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise InputError(f"{path}: found no column {missing[0]}; expected those that --export writes")
        return [
            (reader.line_num, {name: (value or "").removeprefix("'") for name, value in row.items() if name})
            for row in reader
        ]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: found no readable {form} ({error}); expected what --export writes") from error


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [str(row[name]) for name in COLUMNS]
        writer.writerow([f"'{cell}" if cell.startswith(ACTIVE) else cell for cell in cells])
    return file.getvalue()


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _form(path: Path) -> str:
    form = path.suffix.removeprefix(".")
    if form not in ("csv", "jsonl"):
        raise InputError(f"{path}: found a file of type {form!r}; expected a name that ends in .csv or .jsonl")
    return form


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    half = path.with_name(f"{path.name}.part")
    try:
        half.write_text(text, encoding="utf8", newline="")
        half.replace(path)
    except OSError as error:
        raise InputError(f"{path}: found a place that cannot be written ({error.strerror}); choose another") from error
