"""Who wins? Every arm's means, the differences that count, and the paper's order held against ours."""

from collections.abc import Mapping, Sequence

import numpy as np

from mixpo.algorithms.win_rates import win_tie_lose
from mixpo.experiments.results import MEASURES, Results, list_first
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import (
    Difference,
    difference_text,
    differences,
    fewer,
    interval_text,
    label,
    mean_of,
    over,
    p_text,
    sign,
    verdict,
)
from mixpo.report.document import Figure, Group, Section, Table

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


def section(results: Results) -> Section:
    """The main table and the differences."""
    if not results.finished:
        return Section("results", "Results", "No arm finished, so there is nothing to compare.")
    groups = [Group("Every arm", [_picture(results)], main_table(results))]
    pairs = _compared_pairs(results)
    found = {key: by_pair(differences(results, pairs, key)) for key in results.measures(_of_differences(results))}
    if pairs:
        groups.append(Group("Differences", table=_differences_table(results, pairs, found)))
    if (table := _order_table(results)) is not None:
        groups.append(Group("The paper's order", table=table))
    return Section("results", "Results", _opening(results, found), groups)


def compared(results: Results) -> tuple[str, str] | None:
    """The two arms that first sentences compare.

    Of several runs mpo of the second and of the first; else mpo and ppo, else the last and the first that finished.
    """
    names = results.plain
    runs = [name for run in results.runs if (name := results.named(run, "mpo")) in names]
    if len(runs) > 1:
        return runs[1], runs[0]
    mpo, ppo = results.first("mpo"), results.first("ppo")
    if mpo is not None and ppo is not None:
        return mpo, ppo
    return (names[-1], names[0]) if len(names) > 1 else None


def _picture(results: Results) -> Figure:
    panels = {
        title: {name: mean_of(results, name, key) for name in results.finished if results.has([name], key)}
        for key, title in _measures(results).items()
    }
    return figures.forest(panels, name="every-arm", beside=results.first("ppo"))


def _measures(results: Results) -> dict[str, str]:
    """What is known of one arm or more."""
    return {key: title for key, title in MEASURES.items() if any(results.has([one], key) for one in results.finished)}


def main_table(results: Results, *, paper: bool = True) -> Table:
    """A row an arm: means with 95% intervals over test prompts and seeds."""
    failures = [
        f"{name} failed at seed {arm.seed}: {arm.reason}"
        for name in results.names
        for arm in results.of(name)
        if arm.status == "failed"
    ]
    if not results.finished:
        return Table(["arm", "reward"], [[name, "failed"] for name in results.names], failures)
    measures = _measures(results)
    several = len(results.seeds) > 1
    rival = results.first("ppo") or results.finished[0]
    headings = ["arm"]
    for title in measures.values():
        headings += [title, f"sd of {title}"] if several else [title]
    headings += ["KL from SFT", "tokens", "end rate", f"win/tie/lose vs {rival}"]
    if paper:
        headings += ["paper: HH-RLHF", "paper: TL;DR"]
    rows = []
    for name in results.names:
        if not results.done(name):
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        cells = []
        for key in measures:
            known = results.has([name], key)
            cells.append(interval_text(mean_of(results, name, key)) if known else "")
            if several:
                by_seed = results.values(name, key).mean(axis=1) if known else ()
                cells.append(f"{np.std(by_seed, ddof=1):.2f}" if len(by_seed) > 1 else "")
        cells.append(interval_text(mean_of(results, name, "kl_from_sft")))
        cells += [f"{results.values(name, 'tokens').mean():.1f}", f"{results.values(name, 'ended').mean():.0%}"]
        cells.append("" if name == rival else _win_tie_lose(results, name, rival))
        if paper:
            cells += PAPER.get(role(results, name), ("", ""))
        rows.append([label(results, name), *cells])
    return Table(headings, rows, [*failures, *_notes(results, measures)])


def role(results: Results, name: str) -> str:
    """What the paper compares an arm as: its own name, but for MPO with more easy pairs than the recipe's."""
    first = next(iter(results.done(name).values()))
    plain = first.arm.rpartition(": ")[2]  # after the name of its run
    if not first.changes:
        return plain
    if plain == "mpo" and _is_weaker(results, first):
        return "mpo at a weaker split"
    return name


def _is_weaker(results: Results, arm: ArmResult) -> bool:
    own = results.run_of(arm.name).recipe["selection"]
    if list(arm.changes) == ["selection.threshold"] and own["threshold"] is not None:
        return bool(arm.changes["selection.threshold"] < own["threshold"])
    if list(arm.changes) == ["selection.easy_fraction"] and own["easy_fraction"] is not None:
        return bool(arm.changes["selection.easy_fraction"] > own["easy_fraction"])
    return False


def _notes(results: Results, measures: dict[str, str]) -> list[str]:
    notes = [
        "Reward is the mean score of the run's own reward model, which DPO's pairs and PPO were made with"
        + (
            ", but at points with label noise, which learnt from another one."
            if any("label_noise" in name for name in results.names)
            else "."
        )
        + (" The true r* is what the labels were drawn from." if "true_reward" in measures else "")
        + (
            " The second reward model was trained on other pairs, and nothing was optimised for it."
            if "second_score" in measures
            else ""
        ),
        "KL from SFT in nats a completion"
        + ("; of best-of-n its upper bound log n - (n - 1) / n." if results.first("best-of-n") else ".")
        + " An arm further from SFT was on a longer leash: see the section on distance.",
    ]
    if len(results.seeds) > 1:
        notes.append(
            "Intervals are 95% intervals over test prompts and seeds, Student's for either (Banerjee 1960), so two or "
            "three seeds make them wide. sd: of an arm's means, over seeds."
        )
    else:
        notes.append("One seed: the intervals are over test prompts and say nothing of other seeds.")
    if not _one_scale(results, results.finished):
        notes.append(
            "Not all arms were scored by the same reward model, so not all rewards are on one scale; no difference is "
            "given of two that are not."
        )
    return notes


def _one_scale(results: Results, names: Sequence[str]) -> bool:
    """Whether these arms' scores may be compared wherever two of them finished the same seed."""
    return all(results.comparable("score", names[0], name) == results.common_seeds(names[0], name) for name in names)


def _win_tie_lose(results: Results, name: str, rival: str) -> str:
    """Shares of test prompts, over all seeds that both finished, on which the score is higher, equal, lower."""
    seeds = results.comparable("score", name, rival)
    if not seeds:
        return ""
    ours, theirs = (results.values(arm, "score", seeds).ravel() for arm in (name, rival))
    return "/".join(f"{share:.0%}" for share in win_tie_lose(ours, theirs)) + fewer(results, len(seeds), name, rival)


def _of_differences(results: Results) -> list[str]:
    return [name for name in results.finished if name in results.plain or role(results, name) in PAPER]


def _rivals(results: Results) -> list[str]:
    """Against which all others are held: ppo and mpo, or, where neither finished, the first arm."""
    return [rival for arm in ("ppo", "mpo") if (rival := results.first(arm)) is not None] or results.plain[:1]


def _compared_pairs(results: Results) -> list[tuple[str, str]]:
    rivals, names = _rivals(results), _of_differences(results)
    return [(name, rival) for rival in rivals for name in names if name != rival and (name, rival) != tuple(rivals)]


Found = Mapping[str, Mapping[tuple[str, str], Difference]]
"""Differences by measure and pair of arms."""


def _differences_table(results: Results, pairs: Sequence[tuple[str, str]], found: Found) -> Table:
    rows = []
    for one, other in pairs:
        told = [each.get((one, other)) for each in found.values()]
        cells = [(interval_text(each.interval), p_text(each.p)) if each is not None else ("", "") for each in told]
        seeds = len(results.common_seeds(one, other))
        rows.append([f"{one} − {other}{fewer(results, seeds, one, other)}", *(text for pair in cells for text in pair)])
    headings = ["arms", *(text for key in found for text in (MEASURES[key], "p"))]
    return Table(
        headings,
        rows,
        [
            "Paired by prompt and seed. Each p is of no difference (two-sided, of the same interval), corrected for "
            "the differences of its column (Holm)."
        ],
    )


def by_pair(found: Sequence[Difference]) -> dict[tuple[str, str], Difference]:
    """Differences by their two arms."""
    return {(one.one, one.other): one for one in found}


def _order_table(results: Results) -> Table | None:
    claims: list[tuple[str, str]] = []
    where: list[str] = []
    for run in results.runs:
        own = [name for name in results.finished if results.run_of(name) is run]
        by_role = {role(results, name): name for name in reversed(own)}
        for one, other, place in ORDER:
            if {one, other} <= by_role.keys():
                claims.append((by_role[one], by_role[other]))
                where.append(place)
    if not claims:
        return None
    measures = results.measures(results.finished)
    found = claims_table(results, claims, measures)
    headings = [found.headings[0], "in", *found.headings[1:]]
    rows = [[row[0], place, *row[1:]] for row, place in zip(found.rows, where, strict=True)]
    return Table(headings, rows, [*found.notes, "The paper's own figures stand in the first table."])


def claims_table(results: Results, claims: Sequence[tuple[str, str]], measures: Mapping[str, str]) -> Table:
    """A row a claim that the first arm is above the second: our difference, and whether the order appears."""
    found = {key: by_pair(differences(results, claims, key)) for key in measures}
    rows = []
    for claim in claims:
        cells = []
        for key in measures:
            each = found[key].get(claim)
            cells += [difference_text(results, each) if each is not None else "", borne_out(results, claim, each)]
        rows.append([" > ".join(claim), *cells])
    headings = ["the paper finds", *(text for label in measures.values() for text in (f"our {label}", "here"))]
    notes = [f"p corrected for the claims of the column, {len(claims)} at most (Holm)."]
    if len(results.seeds) == 1:
        notes.append("One seed: another may order the arms otherwise.")
    return Table(headings, rows, notes)


def borne_out(results: Results, claim: tuple[str, str], difference: Difference | None) -> str:
    """Whether a claimed order appears."""
    if difference is not None:
        found = sign(difference.interval, difference.p)
        here = {1: "appears", -1: "reversed", 0: "not told apart"}[found]
        return f"{here} at this seed" if found and difference.seeds == 1 else here
    failed = [name for name in claim if not results.done(name)]
    return f"{' and '.join(failed)} failed" if failed else "no seed in common, or other reward models"


def _opening(results: Results, found: Found) -> str:
    first = [results.named(run, arm) for run in results.runs for arm in ("mpo", "ppo")]
    lost = [name for name in first if name in results.names and not results.done(name)]
    before = f"{' and '.join(lost)} failed at every seed. " if lost else ""
    pair = compared(results)
    if pair is None:
        name = results.finished[0]
        text = interval_text(mean_of(results, name, "score"))
        only = "One arm finished" if len(results.finished) == 1 else "There are no two arms to compare first"
        return f"{before}{only}: {name} has a mean reward of {text} {over(results, list(results.done(name)))}."
    one, other = pair
    seeds = results.common_seeds(one, other)
    if not seeds:
        return f"{before}{one} and {other} finished no seed in common, so they cannot be compared prompt by prompt."
    said = []
    for key, name in results.measures(pair).items():
        if results.comparable(key, one, other) != seeds:
            said.append(f"{name} was given by other models and is not compared")
            continue
        told = found.get(key, {}).get(pair) or differences(results, [pair], key)[0]
        said.append(f"{name} {verdict(told.interval, told.p)}")
    whose = f"95% intervals {over(results, seeds)}{fewer(results, len(seeds), one, other)}"
    corrected = "p corrected for all differences below" if any(pair in each for each in found.values()) else ""
    whose = "; ".join(filter(None, (whose, corrected)))
    return f"{before}{one} minus {other}: {'; '.join(said)} ({whose}). {_best(results, found)}".rstrip()


def _best(results: Results, found: Found) -> str:
    """The arm of the recipe with the highest reward, and how it stands to those that all are held against."""
    complete = [name for name in results.plain if results.ran(name) == list(results.done(name)) == results.seeds]
    if len(complete) < 3 or not _one_scale(results, complete):
        return ""
    means = {name: float(results.values(name, "score").mean()) for name in complete}
    top = max(means, key=means.__getitem__)
    whole = "the recipe's arms" if complete == results.plain else f"the {len(complete)} arms that finished every seed"
    words = {1: "above {}", -1: "below {}", 0: "not told apart from {}"}
    said = [
        words[sign(each.interval, each.p)].format(each.other)
        for each in found.get("score", {}).values()
        if each.one == top
    ]
    close = [
        each.one
        for each in found.get("score", {}).values()
        if each.other == top and each.one in complete and sign(each.interval, each.p) == 0
    ]
    if close:
        said.append(f"not told apart from {list_first(close)}")
    return f"Of {whole} {top} has the highest mean reward, {means[top]:.2f}{': ' if said else ''}{', '.join(said)}."
