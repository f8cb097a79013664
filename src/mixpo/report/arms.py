"""The main results: every arm's means, the paired differences, and the paper's order compared with ours."""

import math
import operator
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mixpo.algorithms.win_rates import win_tie_loss_rates
from mixpo.experiments.results import MEASURES, Results, format_first_names
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import (
    ArmDifference,
    Measure,
    Pair,
    compare_arm_pairs,
    describe_difference,
    describe_sample,
    estimate_mean,
    format_arm_label,
    format_difference,
    format_difference_cells,
    format_interval,
    format_number,
    join_names,
    list_measures_by_scale,
    note_missing_seeds,
)
from mixpo.report.document import Section, SectionGroup, Table

PAPER_REWARDS: dict[str, tuple[str, str]] = {
    "sft": ("0.938", "1.108"),
    "dpo-base": ("1.499", "2.911"),
    "dpo": ("1.859", "2.816"),
    "dpo-easy": ("1.907", ""),
    "ppo": ("2.513", "3.460"),
    "mpo": ("2.801", "3.784"),
    "mpo at a weaker split": ("2.22", "3.569"),
    "mpo-reverse": ("2.32", ""),
    "mpo-sft-kl": ("1.915", ""),
    "mpo-reverse-sft": ("1.88", ""),
}
"""Rewards on HH-RLHF and TL;DR that the paper reports (Tables 3 and 6, Figure 4), on its own reward models' scales."""

PAPER_ORDER: tuple[tuple[str, str, str], ...] = (
    ("dpo-base", "sft", "Table 3"),
    ("dpo", "dpo-base", "Table 3, HH-RLHF"),
    ("ppo", "dpo", "Table 3"),
    ("mpo", "ppo", "Table 3"),
    ("mpo", "mpo at a weaker split", "Table 3"),
    ("mpo", "mpo-reverse", "Table 6"),
    ("mpo", "mpo-sft-kl", "Table 6"),
    ("ppo", "mpo-reverse", "Table 6"),
    ("ppo", "mpo-sft-kl", "Table 6"),
    ("mpo-reverse", "mpo-reverse-sft", "Table 6"),
    ("dpo-easy", "dpo-hard", "Figure 4"),
    ("dpo-easy", "dpo", "Figure 4"),
    ("ppo", "ppo-easy", "Figure 4"),
    ("ppo", "ppo-hard", "Figure 4"),
)
"""What the paper finds: the first arm's reward above the second's."""


Differences = Mapping[str, Mapping[Pair, ArmDifference]]
"""Differences by measure and pair of arms."""


def build_results_section(results: Results) -> Section:
    """The section with the main table, differences of arms and the paper's order; one sentence if no arm finished."""
    if not results.finished_arms:
        return Section("results", "Results", "No arm finished, so there is nothing to compare.")
    panels = {
        measure.title: {name: estimate_mean(results, name, measure.key) for name in measure.names}
        for measure in list_measures_by_scale(results)
    }
    forest = figures.plot_forest(panels, name="every-arm", reference=results.find_finished_name("ppo"))
    groups = [SectionGroup("Every arm", [forest], build_main_table(results))]
    pairs = _list_arm_pairs_to_compare(results)
    measures = results.get_shared_measures(_list_arms_to_compare(results))
    differences = {key: compare_arm_pairs(results, pairs, key) for key in measures}
    if pairs:
        groups.append(SectionGroup("Differences", table=_build_differences_table(results, pairs, differences)))
    if (table := _build_paper_claims_table(results)) is not None:
        groups.append(SectionGroup("The paper's order", table=table))
    return Section("results", "Results", _summarize_results(results, differences), groups)


def choose_headline_arms(results: Results) -> Pair | None:
    """(one, other) for the opening texts: mpo of runs 2 and 1, else mpo and ppo, else last and first arm; or None."""
    names = results.finished_recipe_arms
    runs = [name for run in results.runs if (name := results.qualify_arm_name(run, "mpo")) in names]
    if len(runs) > 1:
        return runs[1], runs[0]
    mpo, ppo = results.find_finished_name("mpo"), results.find_finished_name("ppo")
    if mpo is not None and ppo is not None:
        return mpo, ppo
    return (names[-1], names[0]) if len(names) > 1 else None


def build_main_table(results: Results, *, with_paper_columns: bool = True) -> Table:
    """A row for every arm: means with 95% intervals and win/tie/lose, or `failed`; by default also the paper's."""
    failures = [
        f"{name} failed at seed {arm.seed}: {arm.reason}"
        for name in results.arm_names
        for arm in results.list_arm_results(name)
        if arm.status == "failed"
    ]
    if not results.finished_arms:
        return Table(["arm", "reward"], [[name, "failed"] for name in results.arm_names], failures)
    measures = list_measures_by_scale(results)
    several = len(results.seeds) > 1
    rival = results.find_finished_name("ppo") or results.finished_arms[0]
    headings = ["arm"]
    for measure in measures:
        headings += [measure.title, f"sd of {measure.title}"] if several else [measure.title]
    headings += ["KL from SFT", "tokens", "end rate", f"win/tie/lose vs {rival}"]
    if with_paper_columns:
        headings += ["paper: HH-RLHF", "paper: TL;DR"]
    rows = []
    for name in results.arm_names:
        if not results.get_finished_by_seed(name):
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        cells = []
        for measure in measures:
            known = name in measure.names
            cells.append(format_interval(estimate_mean(results, name, measure.key)) if known else "")
            if several:
                by_seed = results.get_evaluation_column(name, measure.key).mean(axis=1) if known else ()
                cells.append(f"{np.std(by_seed, ddof=1):.2f}" if len(by_seed) > 1 else "")
        cells.append(format_interval(estimate_mean(results, name, "kl_from_sft")))
        cells += [
            f"{results.get_evaluation_column(name, 'tokens').mean():.1f}",
            f"{results.get_evaluation_column(name, 'ended').mean():.0%}",
        ]
        cells.append("" if name == rival else _format_win_tie_lose(results, name, rival))
        if with_paper_columns:
            cells += PAPER_REWARDS.get(find_paper_arm(results, name), ("", ""))
        rows.append([format_arm_label(results, name), *cells])
    return Table(headings, rows, [*failures, *_list_main_table_notes(results, measures)])


def find_paper_arm(results: Results, arm: str) -> str:
    """The paper's arm that an arm repeats: `mpo at a weaker split` for MPO with more easy pairs, else its own name."""
    first = next(iter(results.get_finished_by_seed(arm).values()))
    plain = first.arm.rpartition(": ")[2]  # after the name of its run
    if not first.changes:
        return plain
    if plain == "mpo" and _has_more_easy_pairs(results, first):
        return "mpo at a weaker split"
    return arm


def _has_more_easy_pairs(results: Results, arm_result: ArmResult) -> bool:
    """True if a sweep of only the threshold or easy fraction gives the arm more easy pairs than the recipe's."""
    recipe = results.find_run_of_arm(arm_result.name).recipe["selection"]
    for key, is_weaker in (("threshold", operator.lt), ("easy_fraction", operator.gt)):
        if list(arm_result.changes) == [f"selection.{key}"] and recipe[key] is not None:
            return bool(is_weaker(arm_result.changes[f"selection.{key}"], recipe[key]))
    return False


def _list_main_table_notes(results: Results, measures: Sequence[Measure]) -> list[str]:
    """Notes below the main table: what its rewards, KL and intervals mean."""
    keys = {measure.key for measure in measures}
    noisy = any("label_noise" in name for name in results.arm_names)
    reward = "Reward: mean score of the run's own reward model, which labelled DPO's pairs and trained PPO"
    reward += ", except at points with label noise, which trained with another." if noisy else "."
    if "true_reward" in keys:
        reward += " True r*: the reward that the labels were drawn from."
    if "second_score" in keys:
        reward += " Second reward: a reward model trained on other pairs, which no arm optimised."
    bound = ", of best-of-n its upper bound log n − (n − 1) / n" if results.find_finished_name("best-of-n") else ""
    kl = f"KL from SFT: in nats per completion{bound}. Rewards at different KL are compared under Distance."
    notes = [reward, kl]
    if len(results.seeds) > 1:
        notes.append(
            "Intervals: 95% over test prompts and seeds, Student's for both (Banerjee 1960), so wide with two or three "
            "seeds. sd: of an arm's means over seeds."
        )
    else:
        notes.append("Intervals: 95% over test prompts at one seed; other seeds may differ.")
    if len(measures) > len(keys):
        notes.append(
            "The arms were scored by different reward models, whose scales differ: each has its own column, and "
            "rewards are not compared across columns."
        )
    return notes


def _format_win_tie_lose(results: Results, arm: str, rival: str) -> str:
    """`60%/5%/35%` of test prompts on which an arm scores above, equal to, below its rival; empty if not comparable."""
    seeds = results.list_seeds_with_same_scorer("score", arm, rival)
    if not seeds:
        return ""
    scores, rival_scores = (results.get_evaluation_column(one, "score", seeds).ravel() for one in (arm, rival))
    shares = "/".join(f"{share:.0%}" for share in win_tie_loss_rates(scores, rival_scores))
    return shares + note_missing_seeds(results, len(seeds), arm, rival)


def _list_arms_to_compare(results: Results) -> list[str]:
    """Names of the finished arms of the recipe, and of the sweep's arms that the paper reports."""
    return [
        name
        for name in results.finished_arms
        if name in results.finished_recipe_arms or find_paper_arm(results, name) in PAPER_REWARDS
    ]


def _list_arm_pairs_to_compare(results: Results) -> list[Pair]:
    """Pairs of every arm with ppo and with mpo, or with the first arm where neither finished."""
    finished_rivals = [rival for arm in ("ppo", "mpo") if (rival := results.find_finished_name(arm)) is not None]
    rivals, names = finished_rivals or results.finished_recipe_arms[:1], _list_arms_to_compare(results)
    return [(name, rival) for rival in rivals for name in names if name != rival and (name, rival) != tuple(rivals)]


def _build_differences_table(results: Results, arm_pairs: Sequence[Pair], differences: Differences) -> Table:
    """A row for every pair of arms: their paired difference and its corrected p in every measure."""
    rows = []
    for one, other in arm_pairs:
        seeds = len(results.list_common_seeds(one, other))
        cells = [cell for each in differences.values() for cell in format_difference_cells(each.get((one, other)))]
        rows.append([f"{one} − {other}{note_missing_seeds(results, seeds, one, other)}", *cells])
    headings = ["arms", *(text for key in differences for text in (MEASURES[key], "p"))]
    note = "Paired by prompt and seed. p: two-sided, of no difference, corrected for the rows of its column (Holm)."
    return Table(headings, rows, [note])


def _build_paper_claims_table(results: Results) -> Table | None:
    """A row for every order of two finished arms that the paper reports: whether ours agrees; None without one."""
    claims: list[Pair] = []
    sources: list[str] = []
    for run in results.runs:
        names = [name for name in results.finished_arms if results.find_run_of_arm(name) is run]
        by_paper_arm = {find_paper_arm(results, name): name for name in reversed(names)}
        for one, other, source in PAPER_ORDER:
            if {one, other} <= by_paper_arm.keys():
                claims.append((by_paper_arm[one], by_paper_arm[other]))
                sources.append(source)
    if not claims:
        return None
    table = build_claims_table(results, claims, results.get_shared_measures(results.finished_arms))
    headings = [table.headings[0], "in", *table.headings[1:]]
    rows = [[row[0], source, *row[1:]] for row, source in zip(table.rows, sources, strict=True)]
    return Table(headings, rows, [*table.notes, "The paper's own values are in the first table."])


def build_claims_table(results: Results, claims: Sequence[Pair], measures: Mapping[str, str]) -> Table:
    """A row for every claim that one arm's reward is above another's: our difference, and whether it agrees."""
    differences = {key: compare_arm_pairs(results, claims, key) for key in measures}
    rows = []
    for claim in claims:
        row = [" > ".join(claim)]
        for key in measures:
            difference = differences[key].get(claim)
            row += [format_difference(results, difference), check_claim(results, claim, difference)]
        rows.append(row)
    headings = ["the paper finds", *(text for label in measures.values() for text in (f"our {label}", "here"))]
    notes = [f"p corrected for the claims of the column, {len(claims)} at most (Holm)."]
    if len(results.seeds) == 1:
        notes.append("One seed: the order may differ at another.")
    return Table(headings, rows, notes)


def check_claim(results: Results, claim: Pair, difference: ArmDifference | None) -> str:
    """`confirmed`, `reversed` or `not significant`; without a difference, why the claim cannot be checked."""
    if difference is not None:
        verdict = {1: "confirmed", -1: "reversed", 0: "not significant"}[difference.significant_sign]
        return f"{verdict} at this seed" if difference.significant_sign and difference.seeds == 1 else verdict
    failed = [name for name in claim if not results.get_finished_by_seed(name)]
    return f"{' and '.join(failed)} failed" if failed else "no seed in common, or other reward models"


def _summarize_results(results: Results, differences: Differences) -> str:
    """Sentences on the arm with the highest reward, on mpo or ppo if all seeds failed, and on the two compared arms."""
    names = [results.qualify_arm_name(run, arm) for run in results.runs for arm in ("mpo", "ppo")]
    failed = [name for name in names if name in results.arm_names and not results.get_finished_by_seed(name)]
    sentences = [*_describe_best_arm(results, differences), *_describe_two_arms(results, differences)]
    if failed:
        sentences.insert(1, f"{' and '.join(failed)} failed at every seed.")
    return " ".join(sentences)


def _describe_two_arms(results: Results, differences: Differences) -> list[str]:
    """Sentences on the differences of the two compared arms, or on one arm's mean reward where there are no two."""
    pair = choose_headline_arms(results)
    if pair is None:
        name = results.finished_arms[0]
        reward = format_interval(estimate_mean(results, name, "score"))
        sample = describe_sample(results, len(results.get_finished_by_seed(name)))
        only = "Only one arm finished" if len(results.finished_arms) == 1 else "No two arms of the recipe finished"
        return [f"{only}: {name} has a mean reward of {reward} (95% interval {sample})."]
    one, other = pair
    seeds = results.list_common_seeds(one, other)
    if not seeds:
        return [f"{one} and {other} finished at no common seed, so they cannot be compared prompt by prompt."]
    texts = []
    for key, name in results.get_shared_measures(pair).items():
        if results.list_seeds_with_same_scorer(key, one, other) != seeds:
            texts.append(f"{name} is not compared, because different models gave it")
            continue
        difference = differences.get(key, {}).get(pair) or compare_arm_pairs(results, [pair], key)[pair]
        texts.append(describe_difference(name, one, other, difference.interval, difference.p))
    missing = note_missing_seeds(results, len(seeds), one, other)
    sample = f"Intervals are {describe_sample(results, len(seeds))}{missing}"
    if any(pair in by_pair for by_pair in differences.values()):
        sample += "; p is corrected for all differences below (Holm)"
    sentence = re.sub("^no ", "No ", "; ".join(texts))
    return [f"{sentence}.", f"{sample}."]


def _describe_best_arm(results: Results, differences: Differences) -> list[str]:
    """A list of one sentence on the arm with the highest mean reward; empty without three arms on one reward scale."""
    complete = [
        name
        for name in results.finished_recipe_arms
        if results.list_run_seeds(name) == list(results.get_finished_by_seed(name)) == results.seeds
    ]
    scales = [measure.names for measure in list_measures_by_scale(results) if measure.key == "score"]
    if len(complete) < 3 or not any(set(complete) <= set(names) for names in scales):
        return []
    means = {name: float(results.get_evaluation_column(name, "score").mean()) for name in complete}
    best = max(means, key=means.__getitem__)
    group = f"the {len(complete)} arms{'' if complete == results.finished_recipe_arms else ' without failed seeds'}"
    above: list[str] = []
    equal: list[str] = []
    for pair, difference in differences.get("score", {}).items():
        other = pair[1] if pair[0] == best else pair[0]
        if best not in pair or other not in complete:
            continue
        if difference.significant_sign == (1 if pair[0] == best else -1):
            above.append(other)
        elif difference.significant_sign == 0 and not math.isnan(difference.interval.low):
            equal.append(other)
    texts = [f"significantly above {join_names(above)}"] if above else []
    if equal:
        named = join_names(equal) if len(equal) <= 3 else format_first_names(equal)
        texts.append(f"with no significant difference from {named}")
    highest = f"{best} has the highest mean reward of {group} ({format_number(means[best])})"
    return [f"{', '.join([highest, *texts])}."]
