"""What the answers say: a verdict a pair, verdicts counted, and how far judges agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.agreement import cohen_kappa, krippendorff_alpha, over_items
from mixpo.algorithms.statistics import Interval, crossed_interval, length_controlled, wilson_interval
from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import Comparison, comparisons
from mixpo.experiments.results import Results
from mixpo.judge.questions import Judge, Question, Template, both_orders, digest
from mixpo.judge.verdicts import FILE, Panel, Scores, read


@dataclass(frozen=True)
class Verdict:
    """What a judge holds of a pair."""

    pair: Comparison
    outcome: int | None
    """1 where the first arm's completion is scored higher in both orders, -1 where lower, else 0; None if not known."""
    flipped: bool = False
    """Whether each order has another winner."""
    unparsed: bool = False
    """Whether it is not known because a reply could not be parsed."""


@dataclass(frozen=True)
class Judged:
    """Two arms at a seed before a judge."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    verdicts: Sequence[Verdict]
    stale: int = 0
    """Pairs judged whose prompt or completions are not the run's any more."""

    def of(self, category: str | None) -> list[Verdict]:
        """The verdicts of a category, or all."""
        return [one for one in self.verdicts if category in (None, one.pair.category)]


def questions(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, rows: Sequence[Comparison]
) -> tuple[Panel, list[Question]]:
    """What is to be judged, and what is asked for it."""
    asked = [both_orders(judge, template, arms, seed, row) for row in rows]
    pairs = {pair_digest(row): tuple(one.id for one in both) for row, both in zip(rows, asked, strict=True)}
    return Panel(judge, arms, seed, pairs), [one for both in asked for one in both]


def pair_digest(pair: Comparison) -> str:
    """A prompt and two completions, wherever they stand."""
    return digest(pair.prompt, *pair.completions)


def judged(panel: Panel, arms: tuple[str, str], rows: Sequence[Comparison], answers: Mapping[str, Scores]) -> Judged:
    """The verdicts of those pairs of a panel that are among the rows."""
    found = [(row, pair_digest(row)) for row in rows]
    verdicts = [_verdict(row, panel.pairs[key], answers) for row, key in found if key in panel.pairs]
    return Judged(panel.judge, arms, panel.seed, verdicts, len(panel.pairs.keys() - {key for _, key in found}))


def _verdict(pair: Comparison, asked: Sequence[str], answers: Mapping[str, Scores]) -> Verdict:
    if pair.same:
        return Verdict(pair, 0)
    if any(question not in answers for question in asked):
        return Verdict(pair, None)
    straight, swapped = (answers[question] for question in asked)
    if straight is None or swapped is None:
        return Verdict(pair, None, unparsed=True)
    orders = [int(np.sign(straight[0] - straight[1])), int(np.sign(swapped[1] - swapped[0]))]
    return Verdict(pair, orders[0] if orders[0] == orders[1] else 0, flipped=orders[0] * orders[1] == -1)


def judged_runs(results: Results) -> list[Judged]:
    """Everything that judges said of these runs as they stand today."""
    found = []
    for run in results.runs:
        kept = read(run.folder / FILE)
        for panel in kept.panels.values():
            arms = results.named(run, panel.arms[0]), results.named(run, panel.arms[1])
            try:
                rows = comparisons(results, arms, seed=panel.seed)
            except InputError:  # an arm or a seed that the run has no more
                rows = []
            found.append(judged(panel, arms, rows, kept.answers))
    return found


@dataclass(frozen=True)
class Tally:
    """Verdicts counted."""

    outcomes: Float64[np.ndarray, " prompts"]
    """Of those known."""
    win: Interval
    tie: Interval
    lose: Interval
    flips: Interval | None
    """Of those asked; None where nobody was."""
    longer: Interval | None
    """How often the longer completion wins, in characters, where one wins; None where none does."""
    equal_length: Interval | None
    """The win rate at equal length, a tie being half a win; None where it cannot be told."""


def tally(verdicts: Sequence[Verdict]) -> Tally | None:
    """Shares with 95% intervals over prompts; None without a verdict."""
    known = [(one, one.outcome) for one in verdicts if one.outcome is not None]
    if not known:
        return None
    outcomes = np.array([outcome for _, outcome in known], dtype=np.float64)
    longer = np.array([len(one.pair.completions[0]) - len(one.pair.completions[1]) for one, _ in known], np.float64)
    asked = [one.flipped for one, _ in known if not one.pair.same]
    decided = (outcomes * longer)[outcomes * longer != 0]
    win, tie, lose = (crossed_interval((outcomes == value)[None].astype(np.float64)) for value in (1, 0, -1))
    return Tally(
        outcomes,
        win,
        tie,
        lose,
        wilson_interval(sum(asked), len(asked)) if asked else None,
        wilson_interval(int((decided > 0).sum()), len(decided)) if len(decided) else None,
        length_controlled((outcomes + 1.0) / 2.0, longer),
    )


@dataclass(frozen=True)
class Agreement:
    """How far judges of the same pairs agree beyond chance, where they were asked."""

    kappas: Sequence[tuple[Judge, Judge, int, float]]
    """Of every two judges: the pairs that both judged, and Cohen's kappa."""
    pairs: int
    """Judged by two or more."""
    alpha: Interval
    """Krippendorff's, of all judges."""


def agreement(panels: Sequence[Judged]) -> Agreement:
    """Of several judges of the same two arms at the same seed."""
    said = [
        {one.pair.number: one.outcome + 1 for one in panel.verdicts if one.outcome is not None and not one.pair.same}
        for panel in panels
    ]
    kappas = []
    for (one, ours), (other, theirs) in combinations(zip(panels, said, strict=True), 2):
        both = sorted(ours.keys() & theirs.keys())
        ratings = [np.array([of[number] for number in both], dtype=np.int64) for of in (ours, theirs)]
        kappas.append((one.judge, other.judge, len(both), cohen_kappa(*ratings)))
    numbers = sorted({number for of in said for number in of})
    counts = np.zeros((len(numbers), 3), dtype=np.int64)
    for of in said:
        for place, number in enumerate(numbers):
            if number in of:
                counts[place, of[number]] += 1
    counts = counts[counts.sum(axis=1) >= 2]
    return Agreement(kappas, len(counts), over_items(krippendorff_alpha, counts))
