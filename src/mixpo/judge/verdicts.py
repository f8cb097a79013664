"""What judges said, kept in a run's folder: a line an answer, and a line for what was to be judged."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.judge.questions import Judge, Question

FILE = Path("judge") / "verdicts.jsonl"

Scores = tuple[float, float] | None
"""Of both completions in the order shown; None where the reply could not be parsed."""
Keep = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Panel:
    """Which pairs of two arms at a seed a judge is to judge."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    pairs: Mapping[str, tuple[str, ...]]
    """The ids of the two questions by the digest of a pair; none where both completions are the same."""

    @property
    def key(self) -> tuple[Judge, tuple[str, str], int]:
        """Panels of one key are one."""
        return self.judge, self.arms, self.seed


@dataclass
class Kept:
    """What a file of verdicts holds."""

    panels: dict[tuple[Judge, tuple[str, str], int], Panel] = field(default_factory=dict)
    answers: dict[str, Scores] = field(default_factory=dict)
    """By question."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a line."""
        if "panel" in row:
            panel = _panel(**row["panel"])
            earlier = self.panels.get(panel.key, panel)
            self.panels[panel.key] = Panel(*panel.key, {**earlier.pairs, **panel.pairs})
        else:
            scores = row["scores"]
            self.answers[str(row["question"])] = None if scores is None else (float(scores[0]), float(scores[1]))

    def has(self, panel: Panel) -> bool:
        """Whether all pairs of a panel are known."""
        known = self.panels.get(panel.key)
        return known is not None and panel.pairs.items() <= known.pairs.items()


def _panel(judge: dict[str, Any], arms: list[str], seed: int, pairs: dict[str, list[str]]) -> Panel:
    one, other = arms
    return Panel(Judge(**judge), (one, other), seed, {key: tuple(ids) for key, ids in pairs.items()})


def panel_row(panel: Panel) -> dict[str, Any]:
    """A panel as a line."""
    return {"panel": asdict(panel)}


def answer_row(question: Question, scores: Scores, reply: str, tokens: tuple[int, int] | None) -> dict[str, Any]:
    """An answer as a line."""
    return {
        "question": question.id,
        "judge": asdict(question.judge),
        "arms": question.arms,
        "seed": question.seed,
        "prompt": question.number,
        "category": question.category,
        "scores": scores,
        "reply": reply,
        "tokens": tokens,
    }


def read(file: Path) -> Kept:
    """What was kept; a last line without its end, torn by a kill, does not count. Raises `InputError` on others."""
    kept = Kept()
    if not file.exists():
        return kept
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            kept.add(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}:{number}: found no verdict ({type(error).__name__}); expected a line that `mixpo judge` "
                "wrote; drop the line"
            ) from error
    return kept


@contextmanager
def appending(file: Path) -> Iterator[Keep]:
    """Write lines behind those that are there, each on the disk before anything else happens, and nobody beside.

    Raises `InputError` where the file cannot be written, or another process writes it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+b")
    except OSError as error:
        raise InputError(f"{file}: found a place that cannot be written ({error.strerror})") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{file}: found another `mixpo judge` that writes it; wait for its end") from None
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)

        def keep(row: Mapping[str, Any]) -> None:
            try:
                stream.write(json.dumps(row).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
            except OSError as error:
                raise InputError(f"{file}: cannot be written any more ({error.strerror}); make room") from error

        yield keep
