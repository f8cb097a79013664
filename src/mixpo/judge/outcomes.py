"""Outcomes of judging: a verdict for each pair, counts and shares of verdicts, and agreement of judges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mixpo.algorithms.agreement import bootstrap_over_items, cohen_kappa, krippendorff_alpha
from mixpo.algorithms.intervals import Interval, wilson_interval
from mixpo.algorithms.win_rates import PreferenceShares, estimate_preference_shares, length_controlled_win_rate
from mixpo.experiments.comparisons import Comparison, NotInRunError, pair_completions
from mixpo.experiments.results import Results
from mixpo.judge.questions import Judge, JudgeQuestion, Template, compute_digest, make_question_pair
from mixpo.judge.verdicts import FILE, AssignedPair, Assignment, Scores, VerdictLog, read_verdicts


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a pair of completions: the winner, and whether the order shown decided."""

    pair: Comparison
    outcome: int | None
    """1 if the first arm's completion has the higher score in both orders, -1 if the lower, else 0; None if unknown."""
    flip: int = 0
    """1 if the completion shown first wins in both orders, -1 if the one shown second does, else 0."""
    unparsed: bool = False
    """Whether the outcome is unknown because a reply could not be parsed."""

    def swap_arms(self) -> "Verdict":
        """Return a copy with the two arms exchanged, so that a win is a defeat."""
        pair = replace(self.pair, completions=self.pair.completions[::-1])
        return replace(self, pair=pair, outcome=None if self.outcome is None else -self.outcome)


@dataclass(frozen=True)
class JudgeVerdicts:
    """All verdicts of one judge on two arms at a seed."""

    judge: Judge
    arms: tuple[str, str]
    seed: int
    verdicts: Sequence[Verdict]
    stale: int = 0
    """Number of judged pairs whose prompt or completions have changed since."""

    def swap_arms(self) -> "JudgeVerdicts":
        """Return a copy with the two arms exchanged, so that wins are defeats."""
        return replace(self, arms=self.arms[::-1], verdicts=[one.swap_arms() for one in self.verdicts])


def make_assignment(
    judge: Judge, template: Template, arms: tuple[str, str], seed: int, comparisons: Sequence[Comparison]
) -> tuple[Assignment, list[JudgeQuestion]]:
    """Assign pairs to a judge; return the assignment, and the questions of both orders of every differing pair."""
    question_pairs = [make_question_pair(judge, template, arms, seed, row) for row in comparisons]
    pairs = {
        row.number: AssignedPair(_compute_pair_digest(row), tuple(each.id for each in orders))
        for row, orders in zip(comparisons, question_pairs, strict=True)
    }
    return Assignment(judge, arms, seed, pairs), [question for orders in question_pairs for question in orders]


def keep_assigned_arm_order(verdict_log: VerdictLog, arms: tuple[str, str], seed: int) -> tuple[str, str]:
    """Return two arms in the order in which they were assigned before, if so, lest a pair be judged twice."""
    is_swapped = any((one.arms, one.seed) == (arms[::-1], seed) for one in verdict_log.assignments.values())
    return arms[::-1] if is_swapped else arms


def _compute_pair_digest(pair: Comparison) -> str:
    """Return a digest of a pair's prompt and completions, which shows later whether they have changed."""
    return compute_digest(pair.prompt, *pair.completions)


def decide_current_verdicts(
    assignment: Assignment, arms: tuple[str, str], comparisons: Sequence[Comparison], reply_scores: Mapping[str, Scores]
) -> JudgeVerdicts:
    """Decide a judge's verdicts on the assigned pairs that are unchanged; the others are counted as stale."""
    assigned = [(row, assignment.pairs[row.number]) for row in comparisons if row.number in assignment.pairs]
    current = [(row, pair.questions) for row, pair in assigned if pair.digest == _compute_pair_digest(row)]
    verdicts = [_decide_verdict(row, question_ids, reply_scores) for row, question_ids in current]
    return JudgeVerdicts(assignment.judge, arms, assignment.seed, verdicts, len(assignment.pairs) - len(verdicts))


def _decide_verdict(pair: Comparison, question_ids: Sequence[str], reply_scores: Mapping[str, Scores]) -> Verdict:
    """Decide a pair from its reply scores: won if the same arm's is higher in both orders, else a tie, or unknown."""
    if pair.is_identical:
        return Verdict(pair, 0)
    if any(question not in reply_scores for question in question_ids):
        return Verdict(pair, None)
    first_order, second_order = (reply_scores[question] for question in question_ids)
    if first_order is None or second_order is None:
        return Verdict(pair, None, unparsed=True)
    sign, swapped_sign = int(np.sign(first_order[0] - first_order[1])), int(np.sign(second_order[1] - second_order[0]))
    return Verdict(pair, sign if sign == swapped_sign else 0, flip=sign if sign * swapped_sign == -1 else 0)


def load_judge_verdicts(results: Results) -> list[JudgeVerdicts]:
    """Load all judges' verdicts of these runs; pairs whose completions have changed are counted as stale."""
    judge_results = []
    for run in results.runs:
        log = read_verdicts(run.folder / FILE)
        for assignment in log.assignments.values():
            arms = results.qualify_arm_name(run, assignment.arms[0]), results.qualify_arm_name(run, assignment.arms[1])
            try:
                rows = pair_completions(results, arms, seed=assignment.seed)
            except NotInRunError:
                rows = []
            judge_results.append(decide_current_verdicts(assignment, arms, rows, log.scores))
    return judge_results


@dataclass(frozen=True)
class VerdictShares(PreferenceShares):
    """Shares of wins, ties and defeats, and of biases of the judge, with 95% intervals."""

    flips: Interval | None
    """Share of flips among pairs with scores; None without any."""
    first: Interval | None
    """Share of flips in which the completion shown first won; None without flips."""
    longer: Interval | None
    """Share of decided pairs that the longer completion wins, in characters; None without any."""
    equal_length: Interval | None
    """Length-controlled win rate, a tie being half a win; None where it is undefined."""


def compute_verdict_shares(verdicts: Sequence[Verdict]) -> VerdictShares | None:
    """Compute shares of verdicts with 95% intervals over prompts; None without a verdict.

    Identical completions are ties without a question. They count in the proportion in which other pairs have a verdict:
    otherwise an interrupted call would be biased to ties.
    """
    compared = [one for one in verdicts if not one.pair.is_identical]
    decided = [one for one in compared if one.outcome is not None]
    same = [one for one in verdicts if one.pair.is_identical]
    counted = [*decided, *same[: round(len(same) * len(decided) / len(compared)) if compared else len(same)]]
    if not counted:
        return None
    outcomes = np.array([one.outcome for one in counted], dtype=np.float64)
    lengths = np.array([[len(text) for text in one.pair.completions] for one in counted], np.float64)
    length_differences = lengths[:, 0] - lengths[:, 1]
    length_signs = (outcomes * length_differences)[outcomes * length_differences != 0]
    wins, ties, defeats = (int((outcomes == value).sum()) for value in (1, 0, -1))
    flips = [one.flip for one in decided if one.flip]
    return VerdictShares(
        **vars(estimate_preference_shares(wins, ties, defeats, won=wins, lost=defeats)),
        flips=_compute_share_interval(len(flips), len(decided)),
        first=_compute_share_interval(flips.count(1), len(flips)),
        longer=_compute_share_interval(int((length_signs > 0).sum()), len(length_signs)),
        equal_length=length_controlled_win_rate((outcomes + 1.0) / 2.0, length_differences),
    )


def _compute_share_interval(count: int, total: int) -> Interval | None:
    return wilson_interval(count, total) if total else None


@dataclass(frozen=True)
class JudgeAgreement:
    """Agreement beyond chance of judges of the same pairs, without identical completions."""

    kappas: Sequence[tuple[Judge, Judge, int, float]]
    """For every two judges: the number of pairs that both judged, and Cohen's kappa."""
    pairs: int
    """Number of pairs judged by two or more."""
    alpha: Interval
    """Krippendorff's alpha of all judges."""


def compute_judge_agreement(judge_verdicts: Sequence[JudgeVerdicts]) -> JudgeAgreement:
    """Compute Cohen's kappas and Krippendorff's alpha of several judges of the same two arms at the same seed."""
    ratings = [
        {
            each.pair.number: each.outcome + 1
            for each in one.verdicts
            if each.outcome is not None and not each.pair.is_identical
        }
        for one in judge_verdicts
    ]
    kappas = []
    for (one, first), (other, second) in combinations(zip(judge_verdicts, ratings, strict=True), 2):
        common = sorted(first.keys() & second.keys())
        pair = [np.array([rated[number] for number in common], dtype=np.int64) for rated in (first, second)]
        kappas.append((one.judge, other.judge, len(common), cohen_kappa(*pair)))
    numbers = sorted({number for rated in ratings for number in rated})
    by_pair = [[rated[number] for rated in ratings if number in rated] for number in numbers]
    tallies = [np.bincount(outcomes, minlength=3) for outcomes in by_pair if len(outcomes) > 1]
    counts = np.array(tallies, dtype=np.int64).reshape(-1, 3)
    return JudgeAgreement(kappas, len(counts), bootstrap_over_items(krippendorff_alpha, counts))
