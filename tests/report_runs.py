"""Run folders written by hand, for the tests of the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixpo.data.world import generate_world_rows
from mixpo.experiments.results import Results, load_runs
from mixpo.experiments.run import FORMAT
from mixpo.report.document import Section, Table
from mixpo.stages.rows import write_table

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
SFT_SCORES = [0.0, 1.0, 2.0, 1.0, 0.0, 2.0]
BIN = {"count": 4, "accuracy": 0.75, "interval": {"mean": 0.75, "low": 0.3, "high": 0.95}}
JUDGED = {
    "pairs": 8,
    "accuracy": 0.75,
    "accuracy_interval": [0.41, 0.93],
    "gap_under_1": 0.25,
    "score_mean": 0.0,
    "score_std": 1.0,
    "by_gap": [
        {"low": 0.0, "high": 1.0, **BIN},
        {"low": 1.0, "high": 2.0, "count": 0, "accuracy": None, "interval": None},
        {"low": 2.0, "high": None, **BIN},
    ],
}
STEPS = 4
"""Of DPO and of PPO, which samples 10 completions at each."""
MARGINS = [0.3, 0.5, -0.5, 2.5, 3.0, 2.2, 0.9, 2.1, -2.0]
COSTS = {
    # seconds, tokens sampled, tokens trained, FLOPs
    "Data": (1.0, 0, 0, 0.0),
    "SFT": (10.0, 0, 1000, 1e9),
    "RewardModel": (20.0, 0, 2000, 2e9),
    "Samples": (5.0, 500, 0, 3e9),
    "Selection": (1.0, 0, 0, 0.0),
    "DPO": (30.0, 40, 3000, 4e9),
    "PPO": (100.0, 6000, 7000, 8e9),
    "Evaluation": (7.0, 900, 0, 5e8),
    "Gradients": (2.0, 0, 10, 1e6),
}
HARD = "Data SFT RewardModel Samples Selection"
CHAINS = {
    "sft": "Data SFT",
    "best-of-n": "Data SFT",
    "dpo-base": "Data SFT DPO/base",
    "dpo": "Data SFT RewardModel Samples DPO/all",
    "dpo-easy": f"{HARD} DPO/easy",
    "dpo-hard": f"{HARD} DPO/hard",
    "ppo": "Data SFT RewardModel Samples PPO/all",
    "ppo-easy": f"{HARD} PPO/easy",
    "ppo-hard": f"{HARD} PPO/hard",
    "mpo": f"{HARD} DPO/easy PPO/mpo",
    "mpo-sft-kl": f"{HARD} DPO/easy PPO/sftkl",
}
"""What an arm's model stands on, in the order in which it is computed."""

Columns = Mapping[str, Sequence[float]]


@dataclass
class Arm:
    """An arm to write: what its evaluations measured, seed by seed, or why it failed."""

    name: str
    done: Mapping[int, Columns] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    trace: Mapping[int, Sequence[Columns]] = field(default_factory=dict)
    """By seed: the evaluations of the start and of the snapshots."""
    reason: str | None = None
    """Of what failed along its training."""


def scores(values: Sequence[float], *, kl: float | Sequence[float] = 1.0, **columns: Sequence[float]) -> Columns:
    """An evaluation's columns."""
    kls = [kl] * len(values) if isinstance(kl, int | float) else kl
    return {"score": values, "kl_from_sft": kls, **columns}


def shifted(by: Sequence[float], base: Sequence[float] = SFT_SCORES) -> list[float]:
    return [score + difference for score, difference in zip(base, by, strict=True)]


CLEAR = {"sft": SFT_SCORES, "ppo": shifted([1.0] * 6), "mpo": shifted([2.0, 2.2, 1.9, 2.1, 2.0, 1.8])}
"""Scores of which every difference is significant."""


def plain(values: Mapping[str, Sequence[float]], seeds: Sequence[int] = (0,)) -> list[Arm]:
    """Arms of the recipe with these scores, `seed` higher at every seed."""
    return [
        Arm(name, {seed: scores([value + seed for value in given]) for seed in seeds}) for name, given in values.items()
    ]


@dataclass
class Writer:
    """Writes a run folder and its cache."""

    folder: Path
    name: str = "tiny"
    world: bool = False
    second: bool = False
    cache: str = "cache"
    reward: str = ""
    """What tells the run's reward models from those of others."""
    prompts: Sequence[Any] | None = None
    categories: Sequence[str | None] = (None,) * 6
    """Of the test prompts."""
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    margins: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """Of the reward models' test pairs, by seed; `MARGINS` where none are given."""
    pairs: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None
    """Easy and hard ones."""
    alarms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By stage."""

    def run(self, arms: Sequence[Arm], gradients: Sequence[dict[str, Any]] = ()) -> Path:
        """Write the run; its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seeds = dict.fromkeys(seed for arm in arms for seed in [*arm.done, *arm.failed])
        recipe: dict[str, Any] = {
            "name": self.name,
            "note": "</pre><script>",
            "data": {"format": "world" if self.world else "preference", "second_rows": 8 if self.second else 0},
            "ppo": {"kl_coef": 0.1, "kl_budget": None},
            "selection": {"threshold": 2.0, "easy_fraction": None},
            "label_noise": {"share": 0.0},
        }
        content = {
            "format": FORMAT,
            "mixpo": "9.9.9",
            "name": self.name,
            "recipe": {**recipe, **self.recipe},
            "arms": [self.arm(arm, seed) for seed in seeds for arm in arms if seed in arm.done or seed in arm.failed],
            "gradients": list(gradients),
        }
        (self.folder / "results.json").write_text(json.dumps(content), encoding="utf8")
        return self.folder

    def load(self, arms: Sequence[Arm], gradients: Sequence[dict[str, Any]] = ()) -> Results:
        return load_runs(self.run(arms, gradients))

    def arm(self, arm: Arm, seed: int) -> dict[str, Any]:
        """An arm at a seed, as results.json has it."""
        point = "".join(f"{value}" for value in arm.changes.values())
        noisy = point if "label_noise.share" in arm.changes else ""
        stages: dict[str, str] = {}
        for part in CHAINS.get(arm.name, "Data SFT").split():
            kind, _, rest = part.partition("/")
            own = {"Data": "", "SFT": f"{seed}"}.get(kind, f"{seed}{rest}{noisy}")
            if kind in ("DPO", "PPO"):
                own += "" if noisy else point
            stages |= self.stage(f"{kind}-{own}{self.reward if kind == 'RewardModel' else ''}")
        result = {"arm": arm.name, "seed": seed, "changes": dict(arm.changes), "needs": list(stages)}
        judges = {"reward": f"RewardModel-{seed}{self.reward}"}
        if self.second:
            judges["second"] = f"RewardModel-second{seed}{self.reward}"
        if arm.name == "best-of-n":
            result["needs"].append(judges["reward"])
        if seed in arm.failed:
            return {**result, "stages": stages, "status": "failed", "reason": arm.failed[seed]}
        for key in judges.values():
            stages |= self.stage(key)
        evaluated = self.evaluation(f"Evaluation-{seed}{arm.name}{point}{self.reward}", arm.name, arm.done[seed])
        trace = [
            next(iter(self.evaluation(f"Evaluation-{seed}{arm.name}at{n}", arm.name, columns).values()))
            for n, columns in enumerate(arm.trace.get(seed, ()))
        ]
        return {
            **result,
            "status": "done",
            "reward_models": judges,
            "reason": arm.reason,
            "model": str(self.folder / "cache" / arm.name / "model"),
            "evaluation": next(iter(evaluated.values())),
            "trace": trace,
            "stages": stages | evaluated,
        }

    def stage(self, key: str) -> dict[str, str]:
        """Write a stage's folder; its key and place."""
        kind = key.partition("-")[0]
        place = self.folder.parent / self.cache / key
        place.mkdir(parents=True, exist_ok=True)
        seconds, sampled, trained, flops = COSTS[kind]
        cost = {"seconds": seconds, "tokens_sampled": sampled, "tokens_trained": trained, "flops": flops}
        content = {**self.summary(key, place), "alarms": list(self.alarms.get(key, ()))}
        content["cost"] = {**cost, "peak_memory_mib": 50.0}
        (place / "summary.json").write_text(json.dumps(content), encoding="utf8")
        return {key: str(place)}

    def summary(self, key: str, place: Path) -> dict[str, Any]:
        """A stage's figures, after its other files are written."""
        kind, _, rest = key.partition("-")
        if kind == "Data":
            tested = [
                {"prompt": self.prompt(number), "chosen": "a", "rejected": "b", "category": category}
                for number, category in enumerate(self.categories[: len(self.prompts or self.categories)])
            ]
            write_table(place / "test.parquet", tested)
            return {"train_rows": 1280, "test_rows": 8, "demonstration_rows": 7, "bad_rows": 1, "second_rows": 0}
        if kind == "RewardModel":
            given = self.margins.get(int(rest[0]), MARGINS) if rest[0].isdigit() else MARGINS
            for part, margins in (("validation", MARGINS), ("test", given)):
                rows = [{"chosen_score": margin, "rejected_score": 0.0} for margin in margins]
                write_table(place / f"{part}_scores.parquet", rows)
            return {"validation": JUDGED, "test": JUDGED}
        if kind in ("Samples", "Selection"):
            easy, hard = self.pairs or (pairs_of([2.1]), pairs_of([0.0, 0.5, 1.0]))
            if kind == "Samples":
                return {"pairs": len(easy + hard), "identical": 1, "gap_median": 0.75, "score_std": 1.5}
            for part, rows in (("easy", easy), ("hard", hard)):
                write_table(place / f"{part}.parquet", rows)
            return {"threshold": 2.0, "pairs": len(easy + hard), "easy": len(easy), "hard": len(hard)}
        if kind == "DPO":
            row = {"accuracy": 0.6, "chosen_logprob": -9.0, "rejected_logprob": None}
            metrics(place, [{**row, "loss": 0.7 - 0.001 * step} for step in range(STEPS)])
            return {"pairs": 2, "steps": STEPS, "loss": 0.5, "accuracy": 0.9, "margin": None}
        if kind == "PPO":
            row = {"kl": 1.0, "entropy": 2.0, "completions": 10.0}
            metrics(place, [{**row, "score": 0.4 + 0.001 * step} for step in range(STEPS)])
            return {"prompts": 3, "steps": STEPS, "score": 0.4, "kl": 1.0, "snapshots": [2]}
        return {}

    def prompt(self, number: int) -> Any:
        earlier = [{"role": "user", "content": "earlier turn"}, {"role": "assistant", "content": "a reply"}]
        asked = [*earlier, {"role": "user", "content": f"question {number} & <b>more</b>"}]
        return asked if self.prompts is None else self.prompts[number]

    def completion(self, arm: str, number: int) -> str:
        return HOSTILE if number == 0 else f"answer {number} of {arm}"

    def evaluation(self, key: str, arm: str, columns: Columns) -> dict[str, str]:
        made = self.stage(key)
        rows = [
            {
                "prompt": self.prompt(number),
                "completion": self.completion(arm, number),
                "tokens": 3.0,
                "ended": float(number % 2 == 0),
                **{name: float(values[number]) for name, values in columns.items()},
            }
            for number in range(len(columns["score"]))
        ]
        write_table(Path(made[key]) / "completions.parquet", rows)
        return made

    def gradients(self, arm: str, part: str, seed: int, found: Sequence[dict[str, float]] | str) -> dict[str, Any]:
        """A measurement of gradients, as results.json has it: with its rows, or the reason why there are none."""
        measurement = {"arm": arm, "part": part, "seed": seed, "folder": None, "reason": None}
        if isinstance(found, str):
            return {**measurement, "reason": found}
        (place,) = self.stage(f"Gradients-{arm}{part}{seed}").values()
        write_table(Path(place) / "gradients.parquet", found)
        return {**measurement, "folder": place}


def load(folder: Path, arms: Sequence[Arm], gradients: Sequence[dict[str, Any]] = (), **settings: Any) -> Results:
    """The results of a run in a folder, written with these settings of `Writer`."""
    return Writer(folder / "run", **settings).load(arms, gradients)


def metrics(place: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps({"step": number, **row}) + "\n" for number, row in enumerate(rows)]
    (place / "metrics.jsonl").write_text("".join(lines), encoding="utf8")


def pairs_of(gaps: Sequence[float]) -> list[dict[str, Any]]:
    """Scored pairs with these gaps and texts of the world, as Selection writes them; gap 0 is of one text twice."""
    made = generate_world_rows(demonstration_count=0, train_count=len(gaps), test_count=0, seed=len(gaps)).train
    rows = []
    for gap, (prompt, chosen, rejected) in zip(gaps, made, strict=True):
        texts = [chosen, rejected if gap else chosen]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "gap": gap,
                "completions": texts,
                "tokens": [[1, 2], [1, 3] if gap else [1, 2]],
                "scores": [gap, 0.0],
            }
        )
    return rows


def rows(table: Table | None) -> dict[str, Sequence[str]]:
    """A table's rows by their first cell."""
    assert all(len(row) == len(table.headings) for row in table.rows)
    found = {row[0]: row for row in table.rows}
    assert len(found) == len(table.rows)
    return found


def table(section: Section | None, title: str = "") -> Table:
    """The table of a section's group."""
    return next(group.table for group in section.groups if group.title == title and group.table is not None)


def figure_rows(section: Section | None, name: str) -> list[Sequence[Any]]:
    """What a section's figure was drawn from."""
    return next(list(figure.rows) for group in section.groups for figure in group.figures if figure.name == name)
