"""The page of a run: `report.html`, one file that needs no network. Its sentences say what its figures hold."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from jaxtyping import Float64
from markupsafe import Markup

from mixpo.algorithms.statistics import Interval, bootstrap_mean
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.results import Results, completions, metrics
from mixpo.report.table import TableText, interval_text, main_table
from mixpo.stages.engine import read_summary
from mixpo.stages.rows import read_table

SHOWN_PROMPTS = 40
PLOTS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "DPO": (
        ("loss", {"loss": "loss"}),
        ("accuracy on its pairs", {"accuracy": "accuracy"}),
        ("log-prob of a completion", {"chosen": "chosen_logprob", "rejected": "rejected_logprob"}),
        ("implicit reward", {"chosen": "chosen_reward", "rejected": "rejected_reward"}),
    ),
    "PPO": (
        ("score", {"score": "score"}),
        ("KL from its reference", {"kl": "kl"}),
        ("entropy", {"entropy": "entropy"}),
        ("end rate", {"end_rate": "end_rate"}),
        ("completion tokens", {"completion_tokens": "completion_tokens"}),
        ("value: explained variance", {"value_explained_variance": "value_explained_variance"}),
    ),
}
"""By kind of stage: a plot's title, and its lines' names with their keys in metrics.jsonl."""


@dataclass(frozen=True)
class Group:
    """What stands together in a section: figures above a table, and words below it."""

    title: str = ""
    figures: Sequence[Markup] = ()
    table: TableText | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section made of figures and tables."""

    id: str
    title: str
    opening: str
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class Turn:
    """A message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class ArmCompletion:
    """An arm's completion of a prompt."""

    arm: str
    text: str
    score: float
    true_reward: float | None


@dataclass(frozen=True)
class Asked:
    """A test prompt and every arm's completion of it."""

    number: int
    earlier: list[Turn]
    last: str
    completions: list[ArmCompletion]


@dataclass(frozen=True)
class Trained:
    """A stage of the run, once, with the arms that stand on it."""

    key: str
    folder: Path
    seeds: list[int] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Such as DPO."""
        return self.key.partition("-")[0]


def write_page(results: Results) -> Path:
    """Write `report.html` into the run's folder; its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    asked = _asked(results)
    text = environment.get_template("page.html.j2").render(
        name=results.name,
        seeds=results.seeds,
        names=results.names,
        mixpo=results.mixpo,
        date=f"{datetime.fromtimestamp((results.folder / 'results.json').stat().st_mtime):%Y-%m-%d %H:%M}",
        models=[arm for arm in results.arms if arm.model],
        several=len(results.seeds) > 1,
        sections=[
            section
            for section in (_main(results), _reward(results), _selection(results), _training(results), _cost(results))
            if section is not None
        ],
        asked=asked,
        completions_opening=_completions_opening(results, asked),
        shown_arms=[one.arm for one in asked[0].completions] if asked else [],
        pair=compared(results) or ("", ""),
        failed=[arm for arm in results.arms if arm.status == "failed"],
        failures=_failures(results),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True),
    )
    path = results.folder / "report.html"
    path.write_text(text, encoding="utf8")
    return path


def compared(results: Results) -> tuple[str, str] | None:
    """The two arms that the first sentence compares: mpo and ppo, else the last and the first that finished."""
    done = [name for name in results.names if _done(results, name)]
    if "mpo" in done and "ppo" in done:
        return "mpo", "ppo"
    return (done[-1], done[0]) if len(done) > 1 else None


def differences(results: Results, one: str, other: str, key: str) -> Float64[np.ndarray, " prompts"]:
    """One arm's value minus the other's, prompt by prompt, averaged over the seeds that both finished."""
    theirs = {arm.seed: arm for arm in _done(results, other)}
    rows = [
        [
            float(row[key]) - float(rival[key])
            for row, rival in zip(completions(arm), completions(theirs[arm.seed]), strict=True)
        ]
        for arm in _done(results, one)
        if arm.seed in theirs
    ]
    return np.array(rows, dtype=np.float64).mean(axis=0) if rows else np.empty(0)


def verdict(interval: Interval) -> str:
    """What a paired interval lets one say."""
    if math.isnan(interval.low):
        return "of one prompt, which has no interval"
    if interval.low > 0:
        return "and the interval lies above zero"
    if interval.high < 0:
        return "and the interval lies below zero"
    return "and the interval holds zero, so these prompts do not tell the two apart"


def _done(results: Results, name: str) -> list[ArmResult]:
    return [arm for arm in results.of(name) if arm.status == "done"]


def _main(results: Results) -> Section:
    done = [name for name in results.names if _done(results, name)]
    if not done:
        return Section("results", "Results", "No arm finished, so there is nothing to compare.")
    notes = [
        "Reward is the mean score of the run's own reward model. An arm at a larger KL from SFT was on a longer leash: "
        "it went further from SFT for its reward, so compare rewards at about the same KL.",
        *_data_notes(results),
    ]
    planes = []
    for key, label in (("score", "reward (score)"), ("true_reward", "true reward r*")):
        points = [
            figures.Point(name, bootstrap_mean(kl), bootstrap_mean(values))
            for name in done
            if len(kl := _by_prompt(results, name, "kl_from_sft")) and len(values := _by_prompt(results, name, key))
        ]
        if points:
            planes.append(Markup(figures.plane(points, x="KL from SFT (nats a completion)", y=label)))
    groups = [Group(table=main_table(results)), Group("Reward against KL from SFT", planes, notes=notes)]
    if (paired := _paired(results, done)) is not None:
        groups.insert(1, paired)
    return Section("results", "Results", _main_opening(results, done), groups)


def _data_notes(results: Results) -> list[str]:
    """What the rows were, and how many were left out."""
    notes = []
    for _, folder, data in _of_seeds(results, "Data"):
        dropped = f"; {data['bad_rows']:,} rows were left out, listed in {folder / 'bad_rows.jsonl'}"
        notes.append(
            f"Data: {data['train_rows']:,} pairs to train, {data['test_rows']:,} to test, "
            f"{data['demonstration_rows']:,} demonstrations; prompts of at most "
            f"{results.recipe['data']['max_prompt_tokens']} tokens{dropped if data['bad_rows'] else ''}."
        )
    return notes


def _main_opening(results: Results, done: list[str]) -> str:
    pair = compared(results)
    if pair is None:
        scores = _by_prompt(results, done[0], "score")
        mean = interval_text(bootstrap_mean(scores))
        return f"One arm finished: {done[0]}, with a mean score of {mean} over {len(scores)} test prompts."
    one, other = pair
    found = differences(results, one, other, "score")
    if not len(found):
        return f"{one} and {other} finished no seed in common, so they cannot be compared prompt by prompt."
    interval = bootstrap_mean(found)
    shared = {arm.seed for arm in _done(results, one)} & {arm.seed for arm in _done(results, other)}
    over = f", each averaged over {len(shared)} seeds" if len(shared) > 1 else "; one seed"
    return (
        f"Over {len(found)} test prompts the score of {one} minus the score of {other} is on average "
        f"{interval_text(interval)} (paired by prompt, 95% interval over prompts), {verdict(interval)}{over}."
    )


def _paired(results: Results, done: list[str]) -> Group | None:
    """Every arm against the one that the first sentence compares with."""
    pair = compared(results)
    if pair is None:
        return None
    keys = [("score", "reward"), ("true_reward", "true r*"), ("tokens", "tokens")]
    keys = [(key, label) for key, label in keys if len(_by_prompt(results, pair[1], key))]
    body = []
    for name in done:
        if name != pair[1] and len(differences(results, name, pair[1], "score")):
            cells = [interval_text(bootstrap_mean(differences(results, name, pair[1], key))) for key, _ in keys]
            body.append([f"{name} − {pair[1]}", *cells])
    return Group(
        "Differences by prompt",
        table=TableText(["arms", *(label for _, label in keys)], body, []),
        notes=["An interval that holds zero means that the test prompts do not tell the two arms apart."],
    )


def _by_prompt(results: Results, name: str, key: str) -> Float64[np.ndarray, " prompts"]:
    """An arm's values, averaged over its seeds; empty if its rows have no such value."""
    seeds = [completions(arm) for arm in _done(results, name)]
    if any(key not in row for rows in seeds for row in rows):
        return np.empty(0)
    means: Float64[np.ndarray, " prompts"] = np.array([[row[key] for row in rows] for rows in seeds], np.float64).mean(
        axis=0
    )
    return means


def _of_seeds(results: Results, kind: str) -> list[tuple[int, Path, dict[str, Any]]]:
    """A shared stage at each seed, with its summary; one that several seeds share is there once."""
    found: dict[Path, int] = {}
    for seed in results.seeds:
        folder = results.stage(kind, seed)
        if folder is not None:
            found.setdefault(folder, seed)
    return [(seed, folder, read_summary(folder)) for folder, seed in found.items()]


def _reward(results: Results) -> Section | None:
    stages = _of_seeds(results, "RewardModel")
    if not stages:
        return None
    rows, plots = [], []
    for seed, _, summary in stages:
        for part in ("validation", "test"):
            judged = summary[part]
            spread = f"{judged['score_mean']:.2f} ± {judged['score_std']:.2f}"
            rows.append(
                [str(seed), part, f"{judged['pairs']}", _accuracy(judged), _share(judged["gap_under_1"]), spread]
            )
    for part in ("validation", "test"):
        bins = [_bin(one) for one in stages[0][2][part]["by_gap"]]
        svg = figures.shares(bins, title=f"{part} pairs", x="gap between the two scores", y="ordered as labelled")
        plots.append(Markup(svg))
    validation, test = stages[0][2]["validation"], stages[0][2]["test"]
    seed_text = f" (seed {stages[0][0]})" if len(stages) > 1 else ""
    opening = (
        f"The reward model{seed_text} orders {_accuracy(test)} of {test['pairs']} test pairs and "
        f"{_accuracy(validation)} of {validation['pairs']} validation pairs as labelled; "
        f"{_share(test['gap_under_1'])} of the test pairs have a gap under 1."
    )
    headings = ["seed", "pairs of", "count", "accuracy", "gap under 1", "score (mean ± sd)"]
    notes = ["Accuracy by gap with Wilson 95% intervals; n is the number of pairs in the bin. Dotted: chance."]
    alarms = [f"Alarm, seed {seed}: {alarm}." for seed, _, summary in stages for alarm in summary.get("alarms", ())]
    groups = [
        Group(table=TableText(headings, rows, []), notes=alarms),
        Group("Accuracy by gap" + seed_text, plots, notes=notes),
    ]
    return Section("reward-model", "Reward model", opening, groups)


def _accuracy(judged: Mapping[str, Any]) -> str:
    low, high = judged["accuracy_interval"]
    return f"{_share(judged['accuracy'])} [{_share(low)}, {_share(high)}]"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _bin(one: Mapping[str, Any]) -> figures.Share:
    label = f"≥{one['low']:g}" if one["high"] is None else f"{one['low']:g}–{one['high']:g}"
    return figures.Share(label, one["count"], Interval(**one["interval"]) if one["interval"] else None)


def _selection(results: Results) -> Section | None:
    stages = _of_seeds(results, "Selection")
    if not stages:
        return None
    rows = []
    for seed, _, summary in stages:
        spread = summary["score_std"]
        rows.append(
            [
                str(seed),
                *(f"{summary[key]:,}" for key in ("pairs", "easy", "hard", "identical")),
                *(f"{summary[key]:.3g}" for key in ("threshold", "gap_median", "gap_mean", "score_std")),
                f"{summary['gap_median'] / spread:.2f}" if spread else "",
            ]
        )
    headings = ["seed", "pairs", "easy", "hard", "identical", "threshold", "median gap", "mean gap", "score sd"]
    seed, folder, first = stages[0]
    seed_text = f" (seed {seed})" if len(stages) > 1 else ""
    gaps = [float(row["gap"]) for row in read_table(folder / "all.parquet")]
    picture = Markup(
        figures.histogram(gaps, cut=first["threshold"], x="gap between the two scores", left="hard", right="easy")
    )
    units = f", {first['gap_median'] / first['score_std']:.2f} of the scores' spread" if first["score_std"] else ""
    opening = (
        f"Of {first['pairs']:,} pairs sampled from SFT{seed_text}, {first['easy']:,} "
        f"({_share(first['easy'] / first['pairs'])}) have a gap above the threshold of {first['threshold']:.3g} and "
        f"are easy, {first['hard']:,} are hard, and {first['identical']:,} hold the same completion twice; the median "
        f"gap is {first['gap_median']:.2f}{units} (sd {first['score_std']:.2f})."
    )
    return Section(
        "selection",
        "Selection",
        opening,
        [
            Group(table=TableText([*headings, "median gap / score sd"], rows, [])),
            Group("Gaps" + seed_text, [picture]),
        ],
    )


def _stages(results: Results) -> list[Trained]:
    """Every stage of the run that is complete, inputs first."""
    found: dict[str, Trained] = {}
    for arm in results.arms:
        for key, folder in arm.stages.items():
            if (Path(folder) / "summary.json").exists():
                stage = found.setdefault(key, Trained(key, Path(folder)))
                if arm.arm not in stage.arms:
                    stage.arms.append(arm.arm)
                if arm.seed not in stage.seeds:
                    stage.seeds.append(arm.seed)
    return list(found.values())


def _training(results: Results) -> Section | None:
    stages = [stage for stage in _stages(results) if stage.kind in PLOTS and results.seeds[0] in stage.seeds]
    groups, said = [], []
    for stage in stages:
        plots = list(_plots(stage))
        summary = read_summary(stage.folder)
        users = ", ".join(stage.arms)
        size = " · ".join(f"{summary[key]:,} {key}" for key in ("pairs", "prompts", "steps") if key in summary)
        alarms = [f"Alarm: {alarm}." for alarm in summary.get("alarms", ())]
        groups.append(Group(f"{stage.kind} of {users}", plots, notes=[f"{stage.key} · {size}", *alarms]))
        if stage.kind == "DPO" and summary.get("accuracy") is not None:
            said.append(f"DPO of {users} orders {_share(summary['accuracy'])} of its pairs as labelled")
        if stage.kind == "PPO" and summary.get("score") is not None and summary.get("kl") is not None:
            where = f"a mean score of {summary['score']:.2f} at {summary['kl']:.2f} nats from its reference"
            said.append(f"PPO of {users} has {where}")
    if not groups:
        return None
    opening = f"In the last tenth of the steps, {'; '.join(said)}." if said else f"{len(groups)} stages were trained."
    seed = f"Seed {results.seeds[0]} only. " if len(results.seeds) > 1 else ""
    notes = [
        f"{seed}DPO's loss counts only the difference of chosen and rejected, so both log-probs may fall. PPO's KL is "
        "measured from its own reference: SFT for ppo, the DPO model for mpo. Lines of more than "
        f"{figures.MAX_POINTS} steps are averaged in groups."
    ]
    return Section("training", "Training", opening, [*groups, Group(notes=notes)])


def _plots(stage: Trained) -> Iterator[Markup]:
    rows = metrics(stage.folder)
    for title, keys in PLOTS[stage.kind]:
        series = {
            name: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
            for name, key in keys.items()
        }
        if all(series.values()):
            yield Markup(figures.lines(series, title=title))


COSTS = ("seconds", "tokens_sampled", "tokens_trained", "flops", "peak_memory_mib")
COST_HEADINGS = ("seconds", "tokens sampled", "tokens trained", "FLOPs", "peak memory (MiB)")


def _cost(results: Results) -> Section | None:
    stages = _stages(results)
    if not stages:
        return None
    several = len(results.seeds) > 1
    spent = {stage.key: read_summary(stage.folder)["cost"] for stage in stages}
    rows = [
        [
            stage.key,
            *([", ".join(map(str, stage.seeds))] if several else []),
            ", ".join(stage.arms),
            *_cost_cells(spent[stage.key]),
        ]
        for stage in stages
    ]
    totals, seconds = [], {}
    for arm in results.arms:
        own = [spent[key] for key in _stands_on(arm) if key in spent]
        total = {name: sum(float(cost[name]) for cost in own) for name in COSTS[:-1]}
        total["peak_memory_mib"] = max((float(cost["peak_memory_mib"]) for cost in own), default=0.0)
        name = arm.arm if arm.status == "done" else f"{arm.arm} (failed; finished stages only)"
        totals.append([name, *([str(arm.seed)] if several else []), *_cost_cells(total)])
        if arm.status == "done":
            seconds[f"{arm.arm}, seed {arm.seed}" if several else arm.arm] = total["seconds"]
    opening = f"The run's {len(stages)} stages took {_time(sum(cost['seconds'] for cost in spent.values()))}"
    if len(seconds) > 1:
        least, most = min(seconds, key=seconds.__getitem__), max(seconds, key=seconds.__getitem__)
        opening += (
            f"; what an arm stands on took from {_time(seconds[least])} ({least}) to {_time(seconds[most])} ({most}), "
            "stages that arms share counted for each"
        )
    seed_heading = ["seed"] if several else []
    return Section(
        "cost",
        "Cost",
        f"{opening}.",
        [
            Group("By arm", table=TableText(["arm", *seed_heading, *COST_HEADINGS], totals, [])),
            Group("By stage", table=TableText(["stage", *seed_heading, "arms", *COST_HEADINGS], rows, [])),
            Group(
                notes=[
                    "An arm's total is the sum over the stages that it stands on, its evaluation excluded (and the "
                    "reward model where only the evaluation reads it); memory is the "
                    "largest. Tokens and FLOPs are counted; seconds and memory are this machine's."
                ]
            ),
        ],
    )


def _stands_on(arm: ArmResult) -> list[str]:
    """The stages that an arm's model needs: not its evaluation, nor the reward model if nothing else reads it."""
    kinds = {key.partition("-")[0] for key in arm.stages}
    spare = {"Evaluation"} if kinds & {"Samples", "PPO"} else {"Evaluation", "RewardModel"}
    return [key for key in arm.stages if key.partition("-")[0] not in spare]


def _cost_cells(cost: Mapping[str, float]) -> list[str]:
    counted = [f"{cost[name]:,.0f}" for name in COSTS[1:3]]
    return [f"{cost['seconds']:,.1f}", *counted, f"{cost['flops']:.2e}", f"{cost['peak_memory_mib']:,.0f}"]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _failures(results: Results) -> str:
    failed = sum(arm.status == "failed" for arm in results.arms)
    return f"{failed} of {len(results.arms)} {'runs of arms' if len(results.seeds) > 1 else 'arms'} failed"


def _asked(results: Results) -> list[Asked]:
    """The first test prompts with the completions of the arms that finished the first seed that has any."""
    seed = next((arm.seed for arm in results.arms if arm.status == "done"), None)
    rows = {arm.arm: completions(arm) for arm in results.arms if arm.status == "done" and arm.seed == seed}
    if not rows:
        return []
    shown = []
    for number, prompt in enumerate([row["prompt"] for row in next(iter(rows.values()))][:SHOWN_PROMPTS]):
        turns = (
            [Turn("user", prompt)]
            if isinstance(prompt, str)
            else [Turn(turn["role"], turn["content"]) for turn in prompt]
        )
        shown_completions = [
            ArmCompletion(arm, row["completion"], float(row["score"]), row.get("true_reward"))
            for arm, row in ((arm, found[number]) for arm, found in rows.items())
        ]
        shown.append(Asked(number + 1, turns[:-1], turns[-1].content, shown_completions))
    return shown


def _completions_opening(results: Results, asked: list[Asked]) -> str:
    if not asked:
        return "No arm finished, so there are no completions."
    opening = f"These are the first {len(asked)} test prompts with the completions of "
    opening += ", ".join(one.arm for one in asked[0].completions)
    scores = [{shown.arm: shown.score for shown in one.completions} for one in asked]
    pair = compared(results)
    if pair is None or not set(pair) <= set(scores[0]):
        return f"{opening}."
    one, other = pair
    higher = sum(score[one] > score[other] for score in scores)
    lower = sum(score[one] < score[other] for score in scores)
    return f"{opening}; the score of {one} is above that of {other} on {higher} of them and below it on {lower}."
