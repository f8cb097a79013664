"""Who wins? Every arm's means, the differences that count, and the paper's order held against ours."""

from mixpo.algorithms.statistics import crossed_interval, win_tie_lose
from mixpo.experiments.run import ArmResult
from mixpo.report.comparison import (
    Difference,
    counted,
    difference_text,
    differences,
    interval_text,
    mean_of,
    over,
    p_text,
    sign,
    verdict,
)
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import MEASURES, Results

PAPER: dict[str, tuple[str, str]] = {
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

ORDER: tuple[tuple[str, str, str], ...] = (
    ("dpo-base", "sft", "Table 3"),
    ("dpo", "dpo-base", "Table 3, HH-RLHF"),
    ("ppo", "dpo", "Table 3"),
    ("mpo", "ppo", "Table 3"),
    ("mpo", "mpo at a weaker split", "Table 3"),
    ("mpo", "mpo-reverse", "Table 6"),
    ("ppo", "mpo-reverse", "Table 6"),
    ("ppo", "mpo-sft-kl", "Table 6"),
    ("mpo-reverse", "mpo-reverse-sft", "Table 6"),
    ("dpo-easy", "dpo-hard", "Figure 4"),
    ("dpo-easy", "dpo", "Figure 4"),
    ("ppo", "ppo-easy", "Figure 4"),
    ("ppo", "ppo-hard", "Figure 4"),
)
"""What the paper finds: the first arm's reward above the second's."""


def section(results: Results) -> Section:
    """The main table and the differences."""
    if not results.finished:
        return Section("results", "Results", "No arm finished, so there is nothing to compare.")
    groups = [Group("Every arm", table=main_table(results))]
    if (table := _differences_table(results)) is not None:
        groups.append(Group("Differences", table=table))
    if (table := _order_table(results)) is not None:
        groups.append(Group("The paper's order", table=table))
    return Section("results", "Results", _opening(results), groups)


def compared(results: Results) -> tuple[str, str] | None:
    """The two arms that first sentences compare: mpo and ppo, else the last and the first that finished."""
    names = results.plain
    if "mpo" in names and "ppo" in names:
        return "mpo", "ppo"
    return (names[-1], names[0]) if len(names) > 1 else None


def main_table(results: Results, *, paper: bool = True) -> Table:
    """A row an arm: means with bootstrap 95% intervals over test prompts and seeds."""
    measures = {key: label for key, label in MEASURES.items() if any(results.has([n], key) for n in results.finished)}
    several = len(results.seeds) > 1
    rival = "ppo" if "ppo" in results.plain else next(iter(results.plain), "")
    headings = ["arm", *measures.values(), "KL from SFT", "tokens", "end rate", f"win/tie/lose vs {rival}"]
    if several:
        headings.insert(2, "sd over seeds")
    if paper:
        headings += ["paper: HH-RLHF", "paper: TL;DR"]
    rows, notes = [], []
    for name in results.names:
        failed = [arm for arm in results.of(name) if arm.status == "failed"]
        notes += [f"{name} failed at seed {arm.seed}: {arm.reason}" for arm in failed]
        done = results.done(name)
        if not done:
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        shown = f"{name} (failed at {len(failed)} of {len(failed) + len(done)} seeds)" if failed else name
        cells = [interval_text(mean_of(results, name, key)) if results.has([name], key) else "" for key in measures]
        if several:
            by_seed = results.values(name, "score").mean(axis=1)
            cells.insert(1, f"{by_seed.std(ddof=1):.2f}" if len(by_seed) > 1 else "")
        cells.append(interval_text(mean_of(results, name, "kl_from_sft")))
        cells += [f"{results.values(name, 'tokens').mean():.1f}", f"{results.values(name, 'ended').mean():.0%}"]
        cells.append("" if name == rival else _win_tie_lose(results, name, rival))
        if paper:
            cells += PAPER.get(role(results, name), ("", ""))
        rows.append([shown, *cells])
    return Table(headings, rows, [*notes, *_notes(results, measures)])


def role(results: Results, name: str) -> str:
    """What the paper compares an arm as: its own name, but for MPO with more easy pairs than the recipe's."""
    first = next(iter(results.done(name).values()))
    plain = first.arm.rpartition(": ")[2]
    if not first.changes:
        return plain
    if plain == "mpo" and _is_weaker(results, first):
        return "mpo at a weaker split"
    return name


def _is_weaker(results: Results, arm: ArmResult) -> bool:
    own = next(run.recipe["selection"] for run in results.runs if any(one.name == arm.name for one in run.arms))
    if list(arm.changes) == ["selection.threshold"] and own["threshold"] is not None:
        return bool(arm.changes["selection.threshold"] < own["threshold"])
    if list(arm.changes) == ["selection.easy_fraction"] and own["easy_fraction"] is not None:
        return bool(arm.changes["selection.easy_fraction"] > own["easy_fraction"])
    return False


def _notes(results: Results, measures: dict[str, str]) -> list[str]:
    notes = [
        "Reward is the mean score of the run's own reward model, which DPO's pairs and PPO were made with."
        + (" The true r* is what the labels were drawn from." if "true_reward" in measures else "")
        + (
            " The second reward model was trained on other pairs, and nothing was optimised for it."
            if "second_score" in measures
            else ""
        ),
        "KL from SFT in nats a completion"
        + ("; of best-of-n its upper bound log n - (n - 1) / n." if "best-of-n" in results.finished else ".")
        + " An arm further from SFT was on a longer leash: see the section on distance.",
    ]
    if len(results.seeds) > 1:
        notes.append(
            "Intervals are bootstrap 95% intervals over test prompts and seeds, both resampled; a few seeds make them "
            "rather too narrow than too wide."
        )
    else:
        notes.append("One seed: the intervals are over test prompts and say nothing of other seeds.")
    models = {stage.key for stage in results.stages_of("RewardModel") if "label_noise" not in stage.label}
    if len(results.runs) > 1 and len(models) > len(results.seeds):
        notes.append("The runs have different reward models, so their rewards are not on one scale.")
    return notes


def _win_tie_lose(results: Results, name: str, rival: str) -> str:
    """Shares of test prompts, over all seeds that both finished, on which the score is higher, equal, lower."""
    seeds = results.common_seeds(name, rival) if rival else []
    if not seeds:
        return ""
    ours, theirs = (results.values(arm, "score", seeds).ravel() for arm in (name, rival))
    return "/".join(f"{share:.0%}" for share in win_tie_lose(ours, theirs))


def _differences_table(results: Results) -> Table | None:
    rivals = [rival for rival in ("ppo", "mpo") if rival in results.plain] or results.plain[:1]
    names = [name for name in results.finished if name in results.plain or role(results, name) in PAPER]
    pairs = [
        (name, rival)
        for rival in rivals
        for name in names
        if name != rival and (rival, name) != tuple(rivals) and results.common_seeds(name, rival)
    ]
    measures = results.measures(names)
    if not pairs:
        return None
    found = {key: differences(results, pairs, key) for key in measures}
    rows = []
    for place, (one, other) in enumerate(pairs):
        cells = [(found[key][place].interval, found[key][place].p) for key in measures]
        rows.append([f"{one} − {other}", *(text for i, p in cells for text in (interval_text(i), p_text(p)))])
    headings = ["arms", *(text for label in measures.values() for text in (label, "p"))]
    return Table(
        headings,
        rows,
        [
            "Paired by prompt and seed. Each p is of no difference (two-sided, from the same bootstrap), corrected for "
            f"the {counted(len(pairs), 'difference')} of its column (Holm).",
        ],
    )


def _order_table(results: Results) -> Table | None:
    by_role = {role(results, name): name for name in reversed(results.finished)}
    claims = [(by_role[one], by_role[other], where) for one, other, where in ORDER if {one, other} <= by_role.keys()]
    claims = [claim for claim in claims if results.common_seeds(*claim[:2])]
    if not claims:
        return None
    measures = results.measures(results.finished)
    found = {key: differences(results, [claim[:2] for claim in claims], key) for key in measures}
    rows = [
        [
            f"{one} > {other}",
            where,
            *(text for key in measures for text in (difference_text(found[key][place]), borne_out(found[key][place]))),
        ]
        for place, (one, other, where) in enumerate(claims)
    ]
    headings = ["the paper finds", "in", *(text for label in measures.values() for text in (f"our {label}", "here"))]
    note = f"p corrected for {counted(len(claims), 'claim')} (Holm). The paper's own figures stand in the first table."
    return Table(headings, rows, [note])


def borne_out(difference: Difference) -> str:
    """Whether a claimed order appears."""
    return {1: "appears", -1: "reversed", 0: "not told apart"}[sign(difference)]


def _opening(results: Results) -> str:
    pair = compared(results)
    if pair is None:
        name = results.finished[0]
        text = interval_text(mean_of(results, name, "score"))
        return f"One arm finished: {name}, with a mean reward of {text} {over(results, list(results.done(name)))}."
    one, other = pair
    seeds = results.common_seeds(one, other)
    if not seeds:
        return f"{one} and {other} finished no seed in common, so they cannot be compared prompt by prompt."
    said = []
    for key, label in results.measures(pair).items():
        values = results.values(one, key, seeds) - results.values(other, key, seeds)
        interval = crossed_interval(values)
        said.append(f"{label} {interval_text(interval)}, {verdict(interval)}")
    text = f"{one} minus {other}: {'; '.join(said)} (95% interval {over(results, seeds)}). {_best(results)}"
    return text.rstrip()


def _best(results: Results) -> str:
    """The arm with the highest reward, and which others are not told apart from it."""
    complete = [name for name in results.finished if len(results.done(name)) == len(results.seeds)]
    if len(complete) < 3:
        return ""
    means = {name: float(results.values(name, "score").mean()) for name in complete}
    top = max(means, key=means.__getitem__)
    found = differences(results, [(top, name) for name in complete if name != top], "score")
    close = [one.other for one in found if sign(one) == 0]
    if not close:
        return f"Of all arms {top} has the highest mean reward, {means[top]:.2f}, and is told apart from every other."
    return (
        f"Of all arms {top} has the highest mean reward, {means[top]:.2f}; not told apart from it (p corrected for "
        f"{len(found)} comparisons): {', '.join(close)}."
    )
