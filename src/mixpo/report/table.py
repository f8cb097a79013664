"""The main table: every arm's means with their intervals."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.statistics import Interval, bootstrap_mean, win_tie_lose
from mixpo.report.results import Results, completions

COLUMNS = (("score", "reward"), ("true_reward", "true r*"), ("kl_from_sft", "KL from SFT"), ("tokens", "tokens"))
TIE = 0.0


@dataclass(frozen=True)
class TableText:
    """A table as text."""

    headings: list[str]
    rows: list[list[str]]
    notes: list[str]


def main_table(results: Results) -> TableText:
    """Means over test prompts and seeds, with bootstrap 95% intervals over prompts.

    Seeds share their test prompts, so a prompt's values are averaged over seeds before prompts are resampled: the
    interval speaks of prompts; the deviation over seeds is a column of its own where there are several.
    """
    done = {name: [arm for arm in results.of(name) if arm.status == "done"] for name in results.names}
    rows_of = {name: [completions(arm) for arm in arms] for name, arms in done.items()}
    keys = [(key, heading) for key, heading in COLUMNS if any(rows and key in rows[0][0] for rows in rows_of.values())]
    several = len(results.seeds) > 1
    rival = "ppo" if "ppo" in results.names else results.names[0]
    headings = ["arm", *(heading for _, heading in keys), "end rate", f"win/tie/lose vs {rival}"]
    if several:
        headings.insert(2, "sd over seeds")
    body, notes = [], []
    for name in results.names:
        failed = [arm for arm in results.of(name) if arm.status == "failed"]
        notes += [f"{name} (seed {arm.seed}) failed: {arm.reason}" for arm in failed]
        if not rows_of[name]:
            body.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        values = {key: _by_prompt(rows_of[name], key) for key, _ in keys}
        cells = [
            f"{values[key].mean():.1f}" if key == "tokens" else interval_text(bootstrap_mean(values[key]))
            for key, _ in keys
        ]
        ended = float(_by_prompt(rows_of[name], "ended").mean())
        row = [name, *cells, f"{ended:.0%}", "" if name == rival else _against(results, name, rival)]
        if several:
            means = [float(np.mean([r["score"] for r in rows])) for rows in rows_of[name]]
            row.insert(2, f"{np.std(means, ddof=1):.2f}" if len(means) > 1 else "")
            notes.append(f"{name}, reward by seed: {' '.join(f'{mean:.2f}' for mean in means)}")
        body.append(row)
    notes.append("the intervals are over test prompts" + ("" if several else "; one seed says nothing of other seeds"))
    return TableText(headings, body, notes)


def interval_text(interval: Interval) -> str:
    """`1.23 [1.10, 1.36]`."""
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _by_prompt(seeds: list[list[dict[str, float]]], key: str) -> Float64[np.ndarray, " prompts"]:
    means: Float64[np.ndarray, " prompts"] = np.array(
        [[float(row[key]) for row in rows] for rows in seeds], dtype=np.float64
    ).mean(axis=0)
    return means


def _against(results: Results, name: str, rival: str) -> str:
    """Shares of test prompts, over all seeds that both finished, on which the arm's score is higher, equal, lower."""
    ours, theirs = [], []
    for arm in results.of(name):
        other = next((one for one in results.of(rival) if one.seed == arm.seed), None)
        if arm.status == "done" and other is not None and other.status == "done":
            ours += [row["score"] for row in completions(arm)]
            theirs += [row["score"] for row in completions(other)]
    if not ours:
        return ""
    win, tie, lose = win_tie_lose(np.array(ours, dtype=np.float64), np.array(theirs, dtype=np.float64), tie=TIE)
    return f"{win:.0%}/{tie:.0%}/{lose:.0%}"
