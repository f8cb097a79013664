"""Outcomes of judging: a verdict for each pair, counts and shares of verdicts, and agreement of judges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mixpo.algorithms.agreement import bootstrap_over_items, cohen_kappa, krippendorff_alpha
from mixpo.algorithms.intervals import Interval, wilson_interval
from mixpo.algorithms.win_rates import compute_sign_test_p_value, length_controlled_win_rate, win_minus_loss_rate
from mixpo.experiments.comparisons import Comparison, MissingError, pair_completions
from mixpo.experiments.results import Results
from mixpo.judge.questions import Judge, Question, Template, compute_digest, make_question_pair
from mixpo.judge.verdicts import FILE, AssignedPair, Assignment, Scores, VerdictLog, read_verdicts


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a pair of completions."""

    pair: Comparison
    outcome: int | None
    """1 if the first arm's completion has the higher score in both orders, -1 if the lower, else 0; None if unknown."""
    flip: int = 0
    """1 if the completion shown first wins in both orders, -1 if the one shown second does, else 0."""
    unparsed: bool = False
    """Whether the outcome is unknown because a reply could not be parsed."""

    def swap_arms(self) -> "Verdict":
        """The verdict with the two arms exchanged."""
        pair = replace(self.pair, completions=self.pair.completions[::-1])
        return replace(self, pair=pair, outcome=None if self.outcome is None else -self.outcome)


@dataclass(frozen=True)
class JudgeResult:
    """A judge's verdicts on two arms at a seed."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    verdicts: Sequence[Verdict]
    stale: int = 0
    """Number of judged pairs whose prompt or completions have changed since."""

    def swap_arms(self) -> "JudgeResult":
        """The result with the two arms exchanged."""
        return replace(self, arms=self.arms[::-1], verdicts=[one.swap_arms() for one in self.verdicts])

    def filter_by_category(self, category: str | None) -> list[Verdict]:
        """The verdicts of a category, or all."""
        return [one for one in self.verdicts if category in (None, one.pair.category)]


def make_assignment(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, rows: Sequence[Comparison]
) -> tuple[Assignment, list[Question]]:
    """Make a judge's assignment of pairs, and the questions of both orders of each."""
    question_pairs = [make_question_pair(judge, template, arms, seed, row) for row in rows]
    pairs = {
        row.number: AssignedPair(_digest_pair(row), tuple(each.id for each in orders))
        for row, orders in zip(rows, question_pairs, strict=True)
    }
    return Assignment(judge, arms, seed, pairs), [question for orders in question_pairs for question in orders]


def choose_arm_order(log: VerdictLog, arms: tuple[str, str], seed: int) -> tuple[str, str]:
    """The two arms in the order of an earlier assignment, if there is one, so that no pair is judged twice."""
    is_swapped = any((one.arms, one.seed) == (arms[::-1], seed) for one in log.assignments.values())
    return arms[::-1] if is_swapped else arms


def _digest_pair(pair: Comparison) -> str:
    return compute_digest(pair.prompt, *pair.completions)


def collect_verdicts(
    assignment: Assignment, arms: tuple[str, str], rows: Sequence[Comparison], scores: Mapping[str, Scores]
) -> JudgeResult:
    """Collect the verdicts on the assigned pairs that are among `rows` with the same completions."""
    assigned = [(row, assignment.pairs[row.number]) for row in rows if row.number in assignment.pairs]
    current = [(row, pair.questions) for row, pair in assigned if pair.digest == _digest_pair(row)]
    verdicts = [_decide_verdict(row, question_ids, scores) for row, question_ids in current]
    return JudgeResult(assignment.judge, arms, assignment.seed, verdicts, len(assignment.pairs) - len(verdicts))


def _decide_verdict(pair: Comparison, question_ids: Sequence[str], scores: Mapping[str, Scores]) -> Verdict:
    if pair.same:
        return Verdict(pair, 0)
    if any(question not in scores for question in question_ids):
        return Verdict(pair, None)
    first_order, second_order = (scores[question] for question in question_ids)
    if first_order is None or second_order is None:
        return Verdict(pair, None, unparsed=True)
    sign, swapped_sign = int(np.sign(first_order[0] - first_order[1])), int(np.sign(second_order[1] - second_order[0]))
    return Verdict(pair, sign if sign == swapped_sign else 0, flip=sign if sign * swapped_sign == -1 else 0)


def load_judge_results(results: Results) -> list[JudgeResult]:
    """Load all judge results of these runs; pairs whose completions have changed are counted as stale."""
    judge_results = []
    for run in results.runs:
        log = read_verdicts(run.folder / FILE)
        for assignment in log.assignments.values():
            arms = results.qualify_name(run, assignment.arms[0]), results.qualify_name(run, assignment.arms[1])
            try:
                rows = pair_completions(results, arms, seed=assignment.seed)
            except MissingError:
                rows = []
            judge_results.append(collect_verdicts(assignment, arms, rows, log.scores))
    return judge_results


@dataclass(frozen=True)
class VerdictShares:
    """Shares of verdicts with 95% intervals."""

    prompts: int
    win: Interval
    tie: Interval
    lose: Interval
    difference: Interval
    """Win minus lose."""
    p: float
    """P-value of no difference, by the sign test."""
    flips: Interval | None
    """Share of flips among pairs with scores; None without any."""
    first: Interval | None
    """Share of flips in which the completion shown first won; None without flips."""
    longer: Interval | None
    """Share of decided pairs that the longer completion wins, in characters; None without any."""
    equal_length: Interval | None
    """Length-controlled win rate, a tie being half a win; None where it is undefined."""


def compute_verdict_shares(verdicts: Sequence[Verdict]) -> VerdictShares | None:
    """Count verdicts and compute shares with 95% intervals over prompts; None without a verdict.

    Identical completions are ties without a question. They count in the proportion in which other pairs have a verdict:
    otherwise an interrupted call would be biased to ties.
    """
    compared = [one for one in verdicts if not one.pair.same]
    decided = [one for one in compared if one.outcome is not None]
    same = [one for one in verdicts if one.pair.same]
    counted = [*decided, *same[: round(len(same) * len(decided) / len(compared)) if compared else len(same)]]
    if not counted:
        return None
    outcomes = np.array([one.outcome for one in counted], dtype=np.float64)
    length_differences = np.array(
        [len(one.pair.completions[0]) - len(one.pair.completions[1]) for one in counted], np.float64
    )
    length_signs = (outcomes * length_differences)[outcomes * length_differences != 0]
    wins, ties, defeats = (int((outcomes == value).sum()) for value in (1, 0, -1))
    flips = [one.flip for one in decided if one.flip]
    win, tie, lose = (wilson_interval(count, len(counted)) for count in (wins, ties, defeats))
    return VerdictShares(
        len(counted),
        win,
        tie,
        lose,
        win_minus_loss_rate(wins, ties, defeats),
        compute_sign_test_p_value(wins, defeats),
        _compute_share(len(flips), len(decided)),
        _compute_share(flips.count(1), len(flips)),
        _compute_share(int((length_signs > 0).sum()), len(length_signs)),
        length_controlled_win_rate((outcomes + 1.0) / 2.0, length_differences),
    )


def _compute_share(count: int, total: int) -> Interval | None:
    return wilson_interval(count, total) if total else None


@dataclass(frozen=True)
class Agreement:
    """Agreement beyond chance of judges of the same pairs, identical completions excluded."""

    kappas: Sequence[tuple[Judge, Judge, int, float]]
    """For every two judges: the number of pairs that both judged, and Cohen's kappa."""
    pairs: int
    """Number of pairs judged by two or more."""
    alpha: Interval
    """Krippendorff's alpha of all judges."""


def compute_agreement(judge_results: Sequence[JudgeResult]) -> Agreement:
    """Compute the agreement of several judges of the same two arms at the same seed."""
    ratings = [
        {each.pair.number: each.outcome + 1 for each in one.verdicts if each.outcome is not None and not each.pair.same}
        for one in judge_results
    ]
    kappas = []
    for (one, first), (other, second) in combinations(zip(judge_results, ratings, strict=True), 2):
        common = sorted(first.keys() & second.keys())
        pair = [np.array([rated[number] for number in common], dtype=np.int64) for rated in (first, second)]
        kappas.append((one.judge, other.judge, len(common), cohen_kappa(*pair)))
    numbers = sorted({number for rated in ratings for number in rated})
    counts = np.zeros((len(numbers), 3), dtype=np.int64)
    for rated in ratings:
        for index, number in enumerate(numbers):
            if number in rated:
                counts[index, rated[number]] += 1
    counts = counts[counts.sum(axis=1) >= 2]
    return Agreement(kappas, len(counts), bootstrap_over_items(krippendorff_alpha, counts))
