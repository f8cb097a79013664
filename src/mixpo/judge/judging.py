"""What the scores say: a verdict a pair, verdicts counted, and how far judges agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mixpo.algorithms.agreement import bootstrap_over_items, cohen_kappa, krippendorff_alpha
from mixpo.algorithms.intervals import Interval, wilson_interval
from mixpo.algorithms.win_rates import length_controlled_win_rate, sign_test, win_minus_lose
from mixpo.experiments.comparisons import Comparison, MissingError, pair_completions
from mixpo.experiments.results import Results
from mixpo.judge.questions import Judge, Question, Template, both_orders, digest
from mixpo.judge.verdicts import FILE, Assignment, Kept, Pair, Scores, read


@dataclass(frozen=True)
class Verdict:
    """What a judge holds of a pair."""

    pair: Comparison
    outcome: int | None
    """1 where the first arm's completion is scored higher in both orders, -1 where lower, else 0; None if not known."""
    flip: int = 0
    """1 where each order has another winner, the completion shown first; -1 where the one shown second; else 0."""
    unparsed: bool = False
    """Whether it is not known because a reply could not be parsed."""

    def turned(self) -> "Verdict":
        """The same of the two arms the other way round."""
        turned = replace(self.pair, completions=self.pair.completions[::-1])
        return replace(self, pair=turned, outcome=None if self.outcome is None else -self.outcome)


@dataclass(frozen=True)
class Judged:
    """Two arms at a seed before a judge."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    verdicts: Sequence[Verdict]
    stale: int = 0
    """Pairs judged whose prompt or completions are not the run's any more, and none there that is."""

    def turned(self) -> "Judged":
        """The same of the two arms the other way round."""
        return replace(self, arms=self.arms[::-1], verdicts=[one.turned() for one in self.verdicts])

    def of(self, category: str | None) -> list[Verdict]:
        """The verdicts of a category, or all."""
        return [one for one in self.verdicts if category in (None, one.pair.category)]


def questions(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, rows: Sequence[Comparison]
) -> tuple[Assignment, list[Question]]:
    """What is to be judged, and what is asked for it."""
    asked = [both_orders(judge, template, arms, seed, row) for row in rows]
    pairs = {
        row.number: Pair(_digest(row), tuple(one.id for one in both)) for row, both in zip(rows, asked, strict=True)
    }
    return Assignment(judge, arms, seed, pairs), [one for both in asked for one in both]


def as_judged(kept: Kept, arms: tuple[str, str], seed: int) -> tuple[str, str]:
    """The two arms in the order in which they were judged before, so that nothing is assigned twice."""
    turned = any((one.arms, one.seed) == (arms[::-1], seed) for one in kept.assignments.values())
    return arms[::-1] if turned else arms


def _digest(pair: Comparison) -> str:
    return digest(pair.prompt, *pair.completions)


def judged(
    assignment: Assignment, arms: tuple[str, str], rows: Sequence[Comparison], scores: Mapping[str, Scores]
) -> Judged:
    """The verdicts of those pairs of an assignment that are among the rows."""
    found = [(row, assignment.pairs[row.number]) for row in rows if row.number in assignment.pairs]
    verdicts = [_verdict(row, pair.questions, scores) for row, pair in found if pair.digest == _digest(row)]
    return Judged(assignment.judge, arms, assignment.seed, verdicts, len(assignment.pairs) - len(verdicts))


def _verdict(pair: Comparison, asked: Sequence[str], scores: Mapping[str, Scores]) -> Verdict:
    if pair.same:
        return Verdict(pair, 0)
    if any(question not in scores for question in asked):
        return Verdict(pair, None)
    straight, swapped = (scores[question] for question in asked)
    if straight is None or swapped is None:
        return Verdict(pair, None, unparsed=True)
    one, other = int(np.sign(straight[0] - straight[1])), int(np.sign(swapped[1] - swapped[0]))
    return Verdict(pair, one if one == other else 0, flip=one if one * other == -1 else 0)


def judged_runs(results: Results) -> list[Judged]:
    """Everything that judges said of these runs as they stand today."""
    found = []
    for run in results.runs:
        kept = read(run.folder / FILE)
        for assignment in kept.assignments.values():
            arms = results.named(run, assignment.arms[0]), results.named(run, assignment.arms[1])
            try:
                rows = pair_completions(results, arms, seed=assignment.seed)
            except MissingError:
                rows = []
            found.append(judged(assignment, arms, rows, kept.scores))
    return found


@dataclass(frozen=True)
class Tally:
    """Verdicts counted."""

    prompts: int
    win: Interval
    tie: Interval
    lose: Interval
    difference: Interval
    """Win minus lose."""
    p: float
    """Of no difference, by the sign test."""
    flips: Interval | None
    """Of those asked; None where nobody was."""
    first: Interval | None
    """Of the flips: how often the completion shown first won both times; None without flips."""
    longer: Interval | None
    """How often the longer completion wins, in characters, where one wins; None where none does."""
    equal_length: Interval | None
    """The win rate at equal length, a tie being half a win; None where it cannot be told."""


def tally(verdicts: Sequence[Verdict]) -> Tally | None:
    """Shares with 95% intervals over prompts; None without a verdict.

    Pairs of the same text are ties from the start. They count in the proportion in which those asked have a verdict, or
    a call that was stopped would lean to ties.
    """
    asked = [one for one in verdicts if not one.pair.same]
    told = [one for one in asked if one.outcome is not None]
    same = [one for one in verdicts if one.pair.same]
    known = [*told, *same[: round(len(same) * len(told) / len(asked)) if asked else len(same)]]
    if not known:
        return None
    outcomes = np.array([one.outcome for one in known], dtype=np.float64)
    longer = np.array([len(one.pair.completions[0]) - len(one.pair.completions[1]) for one in known], np.float64)
    decided = (outcomes * longer)[outcomes * longer != 0]
    wins, ties, defeats = (int((outcomes == value).sum()) for value in (1, 0, -1))
    flips = [one.flip for one in told if one.flip]
    win, tie, lose = (wilson_interval(count, len(known)) for count in (wins, ties, defeats))
    return Tally(
        len(known),
        win,
        tie,
        lose,
        win_minus_lose(wins, ties, defeats),
        sign_test(wins, defeats),
        _share(len(flips), len(told)),
        _share(flips.count(1), len(flips)),
        _share(int((decided > 0).sum()), len(decided)),
        length_controlled_win_rate((outcomes + 1.0) / 2.0, longer),
    )


def _share(count: int, of: int) -> Interval | None:
    return wilson_interval(count, of) if of else None


@dataclass(frozen=True)
class Agreement:
    """How far judges of the same pairs agree beyond chance, where they were asked."""

    kappas: Sequence[tuple[Judge, Judge, int, float]]
    """Of every two judges: the pairs that both judged, and Cohen's kappa."""
    pairs: int
    """Judged by two or more."""
    alpha: Interval
    """Krippendorff's, of all judges."""


def agreement(judged: Sequence[Judged]) -> Agreement:
    """Of several judges of the same two arms at the same seed."""
    said = [
        {each.pair.number: each.outcome + 1 for each in one.verdicts if each.outcome is not None and not each.pair.same}
        for one in judged
    ]
    kappas = []
    for (one, ours), (other, theirs) in combinations(zip(judged, said, strict=True), 2):
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
    return Agreement(kappas, len(counts), bootstrap_over_items(krippendorff_alpha, counts))
