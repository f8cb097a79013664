"""What judges said, kept in a run's folder: a line for what a judge is to judge, and a line a question that it did."""

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
from mixpo.judge.questions import Judge, Question
from mixpo.judge.replies import HIGHEST

FILE = Path("judge") / "verdicts.jsonl"
FORMAT = 1
"""Of the file's lines, in each of them."""

Scores = tuple[float, float] | None
"""Of both completions in the order shown; None where no reply could be parsed."""
Keep = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Pair:
    """A prompt and the two completions that were to be judged."""

    digest: str
    questions: tuple[str, ...]
    """The ids of the two; none where both completions are the same."""


@dataclass(frozen=True)
class Assignment:
    """Which pairs of two arms at a seed a judge is to judge."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    pairs: Mapping[int, Pair]
    """By the place of the prompt among the run's test prompts: what was to be judged there last."""

    @property
    def key(self) -> tuple[Judge, tuple[str, str], int]:
        """Assignments of one key are one."""
        return self.judge, self.arms, self.seed


@dataclass
class Kept:
    """What a file of verdicts holds."""

    assignments: dict[tuple[Judge, tuple[str, str], int], Assignment] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    """By question."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a line. Raises ValueError on one of another format."""
        if row["format"] != FORMAT:
            raise ValueError(f"format {row['format']!r}, not {FORMAT}")
        if "assignment" in row:
            assignment = _assignment(**row["assignment"])
            earlier = self.assignments.get(assignment.key, assignment)
            self.assignments[assignment.key] = Assignment(*assignment.key, {**earlier.pairs, **assignment.pairs})
        else:
            scores = row["scores"]
            if scores is not None:
                one, other = scores
                if not (0.0 <= one <= HIGHEST and 0.0 <= other <= HIGHEST):
                    raise ValueError(f"scores {one} and {other}, not from 0 to {HIGHEST:g}")
                scores = float(one), float(other)
            self.scores[str(row["question"])] = scores

    def has(self, assignment: Assignment) -> bool:
        """Whether all of an assignment is known."""
        known = self.assignments.get(assignment.key)
        return known is not None and assignment.pairs.items() <= known.pairs.items()


def _assignment(judge: dict[str, Any], arms: list[str], seed: int, pairs: dict[str, dict[str, Any]]) -> Assignment:
    one, other = arms
    found = {int(number): Pair(str(pair["digest"]), tuple(pair["questions"])) for number, pair in pairs.items()}
    return Assignment(Judge(**judge), (one, other), seed, found)


def assignment_row(assignment: Assignment) -> dict[str, Any]:
    """An assignment as a line."""
    return {"format": FORMAT, "assignment": asdict(assignment)}


def scores_row(
    question: Question, scores: Scores, replies: Sequence[str], tokens: tuple[int, int] | None
) -> dict[str, Any]:
    """What a judge said of a question as a line: the scores, every reply, and the tokens of all of them together."""
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
        "tokens": tokens,
    }


def read(file: Path) -> Kept:
    """What was kept; a last line without its end, torn by a kill, does not count. Raises `InputError` on others."""
    kept = Kept()
    if not file.exists():
        return kept
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                if line.endswith(b"\n"):
                    kept.add(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{file}:{number}: found no verdict ({type(error).__name__}: {str(error)[:200]}); expected a line "
                    "that this version's `mixpo judge` wrote; drop the line, or update mixpo"
                ) from error
    return kept


@contextmanager
def appending(file: Path) -> Iterator[Keep]:
    """Write lines behind those that are there, each on the disk before anything else happens, and nobody beside.

    Raises `InputError` where the file cannot be written, or another process writes it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+b", buffering=0)  # a buffer would be written again when the file is closed
    except OSError as error:
        raise InputError(f"{file}: found a place that cannot be written ({error.strerror})") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.truncate(file.read_bytes().rfind(b"\n") + 1)
        except BlockingIOError:
            raise InputError(f"{file}: found another `mixpo judge` that writes it; wait for its end") from None
        except OSError as error:
            raise InputError(f"{file}: found a file that cannot be locked or shortened ({error.strerror})") from error

        def keep(row: Mapping[str, Any]) -> None:
            line, end = json.dumps(row).encode() + b"\n", os.fstat(stream.fileno()).st_size
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError as error:
                with suppress(OSError):
                    stream.truncate(end)  # nothing is ever written behind half a line
                raise InputError(f"{file}: cannot be written any more ({error.strerror}); make room") from error

        yield keep
