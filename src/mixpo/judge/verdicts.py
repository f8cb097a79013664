"""The file of verdicts in a run's folder: a line for each assignment, and one for each question with its scores."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.judge.questions import Judge, JudgeQuestion
from mixpo.judge.replies import MAX_SCORE

FILE = Path("judge") / "verdicts.jsonl"
FORMAT = 1
"""Version of the lines, written in each of them."""

Scores = tuple[float, float] | None
"""Scores of both completions in the order shown; None where no reply could be parsed."""
RowWriter = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class AssignedPair:
    """A pair of completions assigned to a judge, by digest and question ids."""

    digest: str
    questions: tuple[str, ...]
    """Ids of its two questions; none where the completions are identical."""


@dataclass(frozen=True)
class Assignment:
    """The pairs of two arms at a seed that one judge is to compare."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    pairs: Mapping[int, AssignedPair]
    """By index of the prompt among the run's test prompts: the pair that was assigned last."""

    @property
    def key(self) -> tuple[Judge, tuple[str, str], int]:
        """Judge, arms and seed, which identify an assignment."""
        return self.judge, self.arms, self.seed


@dataclass
class VerdictLog:
    """What a file of verdicts holds: assigned pairs, and the scores of every answered question."""

    assignments: dict[tuple[Judge, tuple[str, str], int], Assignment] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    """By question id."""

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Take in a parsed line: an assignment, whose pairs replace earlier ones, or scores; ValueError if invalid."""
        if line["format"] != FORMAT:
            raise ValueError(f"format {line['format']!r}, not {FORMAT}")
        if "assignment" in line:
            assignment = _parse_assignment(**line["assignment"])
            earlier = self.assignments.get(assignment.key, assignment)
            self.assignments[assignment.key] = Assignment(*assignment.key, {**earlier.pairs, **assignment.pairs})
        else:
            scores = line["scores"]
            if scores is not None:
                first, second = scores
                if not (0.0 <= first <= MAX_SCORE and 0.0 <= second <= MAX_SCORE):
                    raise ValueError(f"scores {first} and {second}, not from 0 to {MAX_SCORE:g}")
                scores = float(first), float(second)
            self.scores[str(line["question"])] = scores

    def contains_assignment(self, assignment: Assignment) -> bool:
        """Return True if the file holds all pairs of an assignment, unchanged."""
        stored = self.assignments.get(assignment.key)
        return stored is not None and assignment.pairs.items() <= stored.pairs.items()


def _parse_assignment(
    judge: dict[str, Any], arms: list[str], seed: int, pairs: dict[str, dict[str, Any]]
) -> Assignment:
    first, second = arms
    assigned = {
        int(number): AssignedPair(str(pair["digest"]), tuple(pair["questions"])) for number, pair in pairs.items()
    }
    return Assignment(Judge(**judge), (first, second), seed, assigned)


def make_assignment_row(assignment: Assignment) -> dict[str, Any]:
    """Return the file's line that records an assignment, as a dictionary."""
    return {"format": FORMAT, "assignment": asdict(assignment)}


def make_scores_row(
    question: JudgeQuestion, scores: Scores, replies: Sequence[str], token_counts: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the line of an answered question, as a dictionary: scores, every reply, and their token counts."""
    return {
        "format": FORMAT,
        "question": question.id,
        "judge": asdict(question.judge),
        "arms": question.arms,
        "seed": question.seed,
        "prompt": question.number,
        "category": question.category,
        "scores": scores,
        "replies": replies,
        "tokens": token_counts,
    }


def read_verdicts(file: Path) -> VerdictLog:
    """Read a file of verdicts; empty if missing; skips an incomplete last line, `InputError` on an invalid one."""
    log = VerdictLog()
    if not file.exists():
        return log
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                if line.endswith(b"\n"):
                    log.add_line(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{file}:{number}: found no valid verdict ({type(error).__name__}: {str(error)[:200]}); expected a "
                    "line that this version's `mixpo judge` wrote; delete the line, or update mixpo"
                ) from error
    return log


@contextmanager
def open_verdicts_for_append(file: Path) -> Iterator[RowWriter]:
    """Context manager that locks the file of verdicts and yields a function that appends a row and syncs it to disk.

    Raises `InputError` where the file cannot be written, or another process holds the lock.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+b", buffering=0)  # a buffer would be written again on close
    except OSError as error:
        raise InputError(f"{file}: found a path that cannot be written ({error.strerror})") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.truncate(file.read_bytes().rfind(b"\n") + 1)
        except BlockingIOError:
            raise InputError(f"{file}: found another `mixpo judge` writing it; wait until it ends") from None
        except OSError as error:
            raise InputError(f"{file}: found a file that cannot be locked or shortened ({error.strerror})") from error

        def append_row(row: Mapping[str, Any]) -> None:
            """Append a row and sync it to disk. Raises `InputError`, and removes an incomplete line, if that fails."""
            line, end = json.dumps(row).encode() + b"\n", os.fstat(stream.fileno()).st_size
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError as error:
                with suppress(OSError):
                    stream.truncate(end)  # never append after an incomplete line
                raise InputError(f"{file}: cannot be written ({error.strerror}); free some disk space") from error

        yield append_row
