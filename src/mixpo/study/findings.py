"""What a closed study says, read from its `closed.json` and `judgements.jsonl`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int

from mixpo.algorithms.agreement import bootstrap_over_items, fleiss_kappa, krippendorff_alpha, pairwise_agreement
from mixpo.algorithms.intervals import Interval, wilson_interval
from mixpo.algorithms.win_rates import sign_test, win_minus_lose
from mixpo.data.errors import InputError

FORMAT = 1
"""Of `closed.json`."""


@dataclass(frozen=True)
class Shares:
    """How often the first arm won over some prompts, a prompt being the mean over those who judged it."""

    prompts: int
    win: Interval
    tie: Interval
    lose: Interval
    difference: Interval
    """Win minus lose."""
    p: float
    """Of no difference, by the sign test of the prompts that more preferred one way than the other."""


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree beyond chance on some prompts."""

    common: int
    """Prompts that every counted annotator judged: those of Fleiss' kappa."""
    kappa: Interval
    """nan where it cannot be told."""
    several: int
    """Prompts that two or more judged: those of Krippendorff's alpha and of the pairs."""
    alpha: Interval
    pairs: Interval
    """The share of pairs of judgements of one prompt that agree."""


@dataclass(frozen=True)
class Annotator:
    """What an annotator did."""

    name: str
    judged: int
    skipped: int
    questions: int
    seconds: float | None
    """The median of his judgements."""
    idle: int
    """Judgements before which he was away; they count with the most that is counted."""
    left: Interval | None
    """The share of the left side among judgements that are no ties."""


@dataclass(frozen=True)
class Findings:
    """A closed study."""

    arms: tuple[str, str]
    seed: int
    draw: int
    prompts: int
    content: str
    """Digest of all prompts and completions that were drawn."""
    closed: str
    same: int
    """Prompts that both arms completed alike: ties that nobody was asked about."""
    shares: Mapping[str | None, Shares]
    """By category, where there are some, then of all prompts, under None."""
    agreement: Mapping[str | None, Agreement]
    annotators: Sequence[Annotator]

    @property
    def counted(self) -> list[str]:
        """Those who judged something."""
        return [one.name for one in self.annotators if one.judged]

    @property
    def left_out(self) -> list[str]:
        """Those who judged nothing."""
        return [one.name for one in self.annotators if not one.judged]


def findings(run: Path) -> Findings | None:
    """What the closed study in a run's folder says; None where there is none. Raises `InputError` on damaged files."""
    file = run / "study" / "closed.json"
    if not file.exists():
        return None
    try:
        closed = json.loads(file.read_text(encoding="utf8"))
        if closed["format"] != FORMAT:
            raise InputError(
                f"{file}: found a study of format {closed['format']}, of another version of mixpo; expected {FORMAT}"
            )
        text = (file.parent / "judgements.jsonl").read_text(encoding="utf8")
        return _found(closed, [json.loads(line) for line in text.splitlines()])
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file.parent}: found no readable study ({type(error).__name__}: {error}); expected what "
            "`mixpo annotate RUN --close` writes; close it again"
        ) from error


def _found(closed: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Findings:
    one, other = closed["arms"]
    told = [row for row in rows if row["choice"] != "skip"]
    if wrong := [row["better"] for row in told if row["better"] not in (one, "tie", other)]:
        raise ValueError(f"better {wrong[0]!r}, which is no arm of the study")
    counted = list(dict.fromkeys(row["annotator"] for row in told))
    prompts = sorted({row["prompt"] for row in told})
    kinds = {row["prompt"]: row["category"] for row in [*rows, *closed["same"]]}
    at = {prompt: place for place, prompt in enumerate(prompts)}
    counts: Int[np.ndarray, "prompts choices"] = np.zeros((len(prompts), 3), dtype=np.int64)
    for row in told:
        counts[at[row["prompt"]], (one, "tie", other).index(row["better"])] += 1
    names = list(dict.fromkeys(kind for _, kind in sorted(kinds.items()) if kind is not None))
    shares, agreement = {}, {}
    for name in [*names, None]:
        chosen = counts[np.array([name in (None, kinds[prompt]) for prompt in prompts], dtype=bool)]
        same = sum(name in (None, row["category"]) for row in closed["same"])
        if len(chosen) + same:
            shares[name] = _shares(chosen, same)
            agreement[name] = _agreement(chosen, len(counted))
    return Findings(
        (one, other),
        closed["seed"],
        closed["draw"],
        closed["prompts"],
        closed["content"],
        closed["closed"],
        len(closed["same"]),
        shares,
        agreement,
        [_annotator(name, closed["prompts"] - len(closed["same"]), rows) for name in closed["annotators"]],
    )


def _shares(counts: Int[np.ndarray, "prompts choices"], same: int) -> Shares:
    of_prompts = np.concatenate([counts / counts.sum(axis=1, keepdims=True), np.tile([0.0, 1.0, 0.0], (same, 1))])
    prompts, sums = len(of_prompts), of_prompts.sum(axis=0)
    win, tie, lose = (wilson_interval(float(share), prompts) for share in sums)
    won, lost = (int((counts[:, side] > counts[:, 2 - side]).sum()) for side in (0, 2))
    return Shares(prompts, win, tie, lose, win_minus_lose(*sums.tolist()), sign_test(won, lost))


def _agreement(counts: Int[np.ndarray, "prompts choices"], annotators: int) -> Agreement:
    common = counts[counts.sum(axis=1) == annotators]
    several = counts[counts.sum(axis=1) > 1]
    unknown = Interval(math.nan, math.nan, math.nan)
    return Agreement(
        len(common) if annotators > 1 else 0,
        bootstrap_over_items(fleiss_kappa, common) if annotators > 1 else unknown,
        len(several),
        bootstrap_over_items(krippendorff_alpha, several),
        bootstrap_over_items(pairwise_agreement, several),
    )


def _annotator(name: str, questions: int, rows: Sequence[Mapping[str, Any]]) -> Annotator:
    own = [row for row in rows if row["annotator"] == name and row["choice"] != "skip"]
    sides = [row["choice"] == "left" for row in own if row["choice"] != "tie"]
    return Annotator(
        name,
        len(own),
        sum(row["annotator"] == name and row["choice"] == "skip" for row in rows),
        questions,
        median(row["seconds"] for row in own) if own else None,
        sum(row["idle"] for row in own),
        wilson_interval(sum(sides), len(sides)) if sides else None,
    )
