"""Files of a study: judgements exported and imported as CSV or JSON Lines, and the results of a closed study."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixpo import __version__
from mixpo.data.errors import InputError
from mixpo.study.findings import FORMAT
from mixpo.study.plan import CHOICES, COMMENT_LENGTH, IDLE_SECONDS, REASONS, clean_comment
from mixpo.study.store import AnnotatorQuestion, Answer, StudyClosedError, StudyStore, make_private_folder
from mixpo.study.tables import StudyRow

COLUMNS = ("annotator", "question", "digest", "choice", "reason", "comment", "seconds", "idle", "at")
"""Columns of an export; the digest identifies the question, and only this study's store can compute it."""
QUESTION_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "'")
"""First characters that make a spreadsheet read a cell as a formula, and the quote that prevents it."""
MAX_IMPORT_BYTES = 2**28
"""Size limit of an imported file, more than any study exports."""
_MAX_LISTED_PROBLEMS = 10


def export_judgements(store: StudyStore, study: StudyRow, path: Path) -> int:
    """Write all judgements to a .csv or .jsonl file, without naming the arms; return their number."""
    rows = [
        {
            **{"annotator": question.annotator, "question": question.number},
            **{"digest": question.compute_export_digest(study.secret), **vars(question.answer)},
        }
        for question in store.load_questions()
        if question.answer is not None
    ]
    format_rows = _format_csv if _get_file_type(path) == "csv" else _format_jsonl
    write_atomically(path, format_rows(rows))
    return len(rows)


def import_judgements(store: StudyStore, study: StudyRow, path: Path) -> tuple[int, int]:
    """Import the judgements of an export, all or none; return how many it has, and how many of them were new."""
    questions = {(question.annotator, question.number): question for question in store.load_questions()}
    answers, problems = [], []
    for line, row in _read_export_rows(path):
        try:
            answers.append(_parse_export_row(study, questions, row))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            problem = (
                f"found no {error}; expected every column of an export" if isinstance(error, KeyError) else str(error)
            )
            if len(problem) > 400:  # of a value that may be as long as the file
                problem = f"{problem[:200]}…{problem[-200:]}"
            problems.append(f"{path}:{line}: {problem}")
    if not problems:
        counts = Counter(answer[:2] for answer in answers)
        problems = [
            f"{path}: found question {n} of {name} twice; expected it once" for (name, n), k in counts.items() if k > 1
        ]
    if problems:
        rest = len(problems) - _MAX_LISTED_PROBLEMS
        remainder = [f"... and {rest} more"] if rest > 0 else []
        fix = "nothing was imported; export again, or correct the file"
        raise InputError("\n".join([*problems[:_MAX_LISTED_PROBLEMS], *remainder, fix]))
    try:
        return len(answers), store.import_answers(answers)
    except StudyClosedError:
        raise InputError(f"{store.name}: found a closed study; expected an open one; nothing was imported") from None


def write_closed_study(store: StudyStore, study: StudyRow, folder: Path) -> Path:
    """Write `judgements.jsonl`, then `closed.json`, from which the report is computed; return the latter's path."""
    arms = (study.first, study.second)
    rows = []
    for question in store.load_questions():
        if question.answer is not None:
            left, right = arms[::-1] if question.swapped else arms
            winner = {"left": left, "right": right, "tie": "tie", "skip": None}[question.answer.choice]
            rows.append(
                {
                    **{"annotator": question.annotator, "question": question.number, "prompt": question.item.number},
                    **{"category": question.item.category, "left": left, "right": right, "better": winner},
                    **vars(question.answer),
                }
            )
    make_private_folder(folder)
    write_atomically(folder / "judgements.jsonl", _format_jsonl(rows))
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
        "annotators": [annotator.name for annotator in store.load_annotators()],
        "guidelines": study.guidelines,
    }
    write_atomically(folder / "closed.json", json.dumps(content, indent=2) + "\n")
    return folder / "closed.json"


def _parse_export_row(
    study: StudyRow, questions: Mapping[tuple[str, int], AnnotatorQuestion], row: Mapping[str, Any]
) -> tuple[str, int, Answer]:
    """Return annotator, number and answer of an export's row. Raises ValueError if it does not fit the study."""
    if not QUESTION_NUMBER.fullmatch(str(row["question"])):
        raise ValueError(f"found question {row['question']!r}; expected a whole number from 1")
    annotator, number = str(row["annotator"]), int(row["question"])
    question = questions.get((annotator, number))
    if question is None:
        raise ValueError(f"found question {number} of {annotator!r}; expected one of this study")
    if row["digest"] != (expected := question.compute_export_digest(study.secret)):
        raise ValueError(f"found digest {row['digest']!r}; expected {expected}: another study, or another question")
    if invalid := [name for name in ("choice", "reason", "comment", "at") if not isinstance(row[name], str)]:
        raise ValueError(f"found {invalid[0]} {row[invalid[0]]!r}; expected text")
    if row["choice"] not in CHOICES:
        raise ValueError(f"found choice {row['choice']!r}; expected one of {', '.join(CHOICES)}")
    if row["reason"] not in (REASONS if row["choice"] == "skip" else ("",)):
        expected = ", ".join(REASONS) if row["choice"] == "skip" else "none"
        raise ValueError(f"found reason {row['reason']!r} of choice {row['choice']}; expected {expected}")
    if (
        (comment := row["comment"]) != clean_comment(comment)
        or len(comment) > COMMENT_LENGTH
        or comment != comment.encode(errors="replace").decode()  # it has half a surrogate pair
    ):
        raise ValueError(
            f"found a comment of {len(comment)} characters; expected {COMMENT_LENGTH} at most, without blanks around "
            "it, zero characters and halves of surrogate pairs"
        )
    if not TIMESTAMP.fullmatch(row["at"]):
        raise ValueError(f"found at {row['at']!r}; expected a time such as 2026-11-22T12:00:00+00:00")
    idle = str(row["idle"]).capitalize()  # spreadsheets write TRUE
    if idle not in ("True", "False") or not 0 <= float(row["seconds"]) <= IDLE_SECONDS:
        raise ValueError(
            f"found seconds {row['seconds']!r} and idle {row['idle']!r}; expected 0 to {IDLE_SECONDS:g}, True or False"
        )
    answer = Answer(row["choice"], row["reason"], comment, float(row["seconds"]), idle == "True", row["at"])
    return annotator, number, answer


def _read_export_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of a .csv or .jsonl export, each with its line number. Raises `InputError` if unreadable."""
    file_type = _get_file_type(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_IMPORT_BYTES + 1)
        if len(content) > MAX_IMPORT_BYTES:
            raise InputError(f"{path}: found more than {MAX_IMPORT_BYTES:,} bytes; expected what --export writes")
        text = content.decode("utf-8-sig")
        if file_type == "jsonl":
            return [(line, json.loads(row)) for line, row in enumerate(text.split("\n"), start=1) if row.strip()]
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
        raise InputError(f"{path}: found no readable {file_type} ({error}); expected what --export writes") from error


def _format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV text, with cells quoted that a spreadsheet would read as formulas."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [str(row[name]) for name in COLUMNS]
        writer.writerow([f"'{cell}" if cell.startswith(FORMULA_PREFIXES) else cell for cell in cells])
    return file.getvalue()


def _format_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _get_file_type(path: Path) -> str:
    """Return the type of a file by its name, csv or jsonl. Raises `InputError` on others."""
    file_type = path.suffix.removeprefix(".")
    if file_type not in ("csv", "jsonl"):
        raise InputError(f"{path}: found a file of type {file_type!r}; expected a name that ends in .csv or .jsonl")
    return file_type


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file through a temporary one, so that it is complete or absent; `private`: only its owner reads it.

    Raises `InputError` where it cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(partial, flags, 0o600 if private else 0o666), "w", encoding="utf8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: found a path that cannot be written ({error.strerror}); choose another") from error
