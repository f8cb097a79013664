"""Results of a closed study, computed from its `closed.json` and `judgements.jsonl`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int

from mixpo.algorithms.agreement import bootstrap_over_items, fleiss_kappa, krippendorff_alpha, pairwise_agreement
from mixpo.algorithms.intervals import Interval, wilson_interval
from mixpo.algorithms.win_rates import PreferenceShares, estimate_preference_shares
from mixpo.data.errors import InputError

FORMAT = 1
"""Version of `closed.json`."""


@dataclass(frozen=True)
class AnnotatorAgreement:
    """Agreement of annotators beyond chance on the same prompts."""

    common: int
    """Number of prompts that every active annotator judged, the basis of Fleiss' kappa."""
    kappa: Interval
    """Fleiss' kappa; nan where it is undefined."""
    several: int
    """Number of prompts that two or more judged, the basis of Krippendorff's alpha and of the pairs."""
    alpha: Interval
    pairs: Interval
    """Share of pairs of judgements of the same prompt that agree."""


@dataclass(frozen=True)
class AnnotatorSummary:
    """One annotator's numbers of judgements, median seconds of a judgement, and share of the left side."""

    name: str
    judged: int
    skipped: int
    questions: int
    seconds: float | None
    """Median time of a judgement; None without one."""
    idle: int
    """Number of judgements that took longer than the limit, at which they count."""
    left: Interval | None
    """Share of the left side among judgements that are no ties."""


@dataclass(frozen=True)
class StudyFindings:
    """Results of a closed study: shares of preference and agreement by category, and annotators."""

    arms: tuple[str, str]
    seed: int
    draw: int
    prompts: int
    content: str
    """Digest of all compared prompts and completions."""
    closed: str
    same: int
    """Number of prompts with identical completions, which count as ties."""
    shares: Mapping[str | None, PreferenceShares]
    """By category, where there are any; those of all prompts under None. A prompt counts as its annotators' mean."""
    agreement: Mapping[str | None, AnnotatorAgreement]
    annotators: Sequence[AnnotatorSummary]

    @property
    def annotators_with_judgements(self) -> list[str]:
        """Names of the annotators who judged at least once."""
        return [each.name for each in self.annotators if each.judged]

    @property
    def annotators_without_judgements(self) -> list[str]:
        """Names of the annotators who never judged."""
        return [each.name for each in self.annotators if not each.judged]


def load_study_findings(run_folder: Path) -> StudyFindings | None:
    """Compute the results of the closed study in a run's folder from its files; None where there is none.

    Raises `InputError` on damaged files.
    """
    file = run_folder / "study" / "closed.json"
    if not file.exists():
        return None
    try:
        closed = json.loads(file.read_text(encoding="utf8"))
        if closed["format"] != FORMAT:
            raise InputError(
                f"{file}: found a study of format {closed['format']}, of another version of mixpo; expected {FORMAT}"
            )
        text = (file.parent / "judgements.jsonl").read_text(encoding="utf8")
        return _compute_findings(closed, [json.loads(line) for line in text.splitlines()])
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file.parent}: found no readable study ({type(error).__name__}: {error}); expected what "
            "`mixpo annotate RUN --close` writes; close it again"
        ) from error


def _compute_findings(closed: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> StudyFindings:
    """Compute the results from the contents of `closed.json` and `judgements.jsonl`. ValueError on an unknown arm."""
    first, second = closed["arms"]
    judgements = [row for row in rows if row["choice"] != "skip"]
    if invalid := [row["better"] for row in judgements if row["better"] not in (first, "tie", second)]:
        raise ValueError(f"better {invalid[0]!r}, expected an arm of the study or tie")
    active = list(dict.fromkeys(row["annotator"] for row in judgements))
    prompts = sorted({row["prompt"] for row in judgements})
    categories = {row["prompt"]: row["category"] for row in [*rows, *closed["same"]]}
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    counts: Int[np.ndarray, "prompts choices"] = np.zeros((len(prompts), 3), dtype=np.int64)
    for row in judgements:
        counts[index_of[row["prompt"]], (first, "tie", second).index(row["better"])] += 1
    names = list(dict.fromkeys(category for _, category in sorted(categories.items()) if category is not None))
    shares, agreement = {}, {}
    for name in [*names, None]:
        selected = counts[np.array([name in (None, categories[prompt]) for prompt in prompts], dtype=bool)]
        same = sum(name in (None, row["category"]) for row in closed["same"])
        if len(selected) + same:
            shares[name] = _compute_preference_shares(selected, same)
            agreement[name] = _compute_annotator_agreement(selected, len(active))
    return StudyFindings(
        (first, second),
        closed["seed"],
        closed["draw"],
        closed["prompts"],
        closed["content"],
        closed["closed"],
        len(closed["same"]),
        shares,
        agreement,
        [_summarize_annotator(name, closed["prompts"] - len(closed["same"]), rows) for name in closed["annotators"]],
    )


def _compute_preference_shares(counts: Int[np.ndarray, "prompts choices"], ties: int) -> PreferenceShares:
    """Compute win, tie and lose shares from choices counted by prompt, and from prompts that are ties without any."""
    prompt_shares = np.concatenate([counts / counts.sum(axis=1, keepdims=True), np.tile([0.0, 1.0, 0.0], (ties, 1))])
    won, lost = (int((counts[:, side] > counts[:, 2 - side]).sum()) for side in (0, 2))
    return estimate_preference_shares(*prompt_shares.sum(axis=0).tolist(), won=won, lost=lost)


def _compute_annotator_agreement(
    counts: Int[np.ndarray, "prompts choices"], annotator_count: int
) -> AnnotatorAgreement:
    """Compute agreement from choices counted by prompt; undefined kappas are nan."""
    common = counts[counts.sum(axis=1) == annotator_count]
    several = counts[counts.sum(axis=1) > 1]
    unknown = Interval(math.nan, math.nan, math.nan)
    return AnnotatorAgreement(
        len(common) if annotator_count > 1 else 0,
        bootstrap_over_items(fleiss_kappa, common) if annotator_count > 1 else unknown,
        len(several),
        bootstrap_over_items(krippendorff_alpha, several),
        bootstrap_over_items(pairwise_agreement, several),
    )


def _summarize_annotator(name: str, question_count: int, rows: Sequence[Mapping[str, Any]]) -> AnnotatorSummary:
    """Count one annotator's judgements among the rows, with median time and share of the left side."""
    judgements = [row for row in rows if row["annotator"] == name and row["choice"] != "skip"]
    left_choices = [row["choice"] == "left" for row in judgements if row["choice"] != "tie"]
    return AnnotatorSummary(
        name,
        len(judgements),
        sum(row["annotator"] == name and row["choice"] == "skip" for row in rows),
        question_count,
        median(row["seconds"] for row in judgements) if judgements else None,
        sum(row["idle"] for row in judgements),
        wilson_interval(sum(left_choices), len(left_choices)) if left_choices else None,
    )
