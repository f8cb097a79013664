"""The report of a run folder that is written here by hand."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from mixpo.algorithms.statistics import Interval, bootstrap_mean
from mixpo.data.errors import InputError
from mixpo.experiments.run import FORMAT
from mixpo.report.page import verdict, write_page
from mixpo.report.results import load
from mixpo.report.table import main_table
from mixpo.stages.rows import write_table

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
COST = {"seconds": 10.0, "tokens_sampled": 100, "tokens_trained": 200, "tokens_scored": 0, "flops": 1e9}
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
SELECTION = {
    "threshold": 1.0,
    "pairs": 4,
    "easy": 1,
    "hard": 3,
    "identical": 1,
    "gap_mean": 0.9,
    "gap_median": 0.75,
    "gap_under_1": 0.75,
    "score_std": 1.5,
}
SFT_SCORES = [0.0, 1.0, 2.0, 1.0, 0.0, 2.0]


def stage(
    folder: Path, name: str, summary: dict[str, Any], steps: list[dict[str, Any]] | None = None
) -> dict[str, str]:
    place = folder / "cache" / name
    place.mkdir(parents=True, exist_ok=True)
    content = {**summary, "cost": {**COST, "peak_memory_mib": 50.0}}
    (place / "summary.json").write_text(json.dumps(content), encoding="utf8")
    if steps is not None:
        lines = [json.dumps({"step": number, **row}) + "\n" for number, row in enumerate(steps)]
        (place / "metrics.jsonl").write_text("".join(lines), encoding="utf8")
    return {name: str(place)}


def evaluation(folder: Path, name: str, scores: list[float]) -> dict[str, str]:
    made = stage(folder, name, {})
    earlier = [{"role": "user", "content": "earlier turn"}, {"role": "assistant", "content": "a reply"}]
    rows = [
        {
            "prompt": [*earlier, {"role": "user", "content": f"question {number} & <b>more</b>"}],
            "completion": HOSTILE if number == 0 else f"answer {number} of {name}",
            "score": score,
            "kl_from_sft": 0.5 * number,
            "tokens": 3.0,
            "ended": float(number % 2 == 0),
        }
        for number, score in enumerate(scores)
    ]
    write_table(Path(made[name]) / "completions.parquet", rows)
    return made


def run_folder(
    folder: Path,
    scores: dict[str, list[float]],
    *,
    failed: bool = True,
    full: bool = True,
    seeds: tuple[int, ...] = (0,),
) -> Path:
    arms = [arm for seed in seeds for arm in arms_of(folder, scores, failed=failed, full=full, seed=seed)]
    content = {
        "format": FORMAT,
        "mixpo": "9.9.9",
        "name": "tiny",
        "recipe": {"name": "tiny", "note": "</pre><script>"},
        "arms": arms,
    }
    (folder / "results.json").write_text(json.dumps(content), encoding="utf8")
    return folder


def arms_of(
    folder: Path, scores: dict[str, list[float]], *, failed: bool, full: bool, seed: int
) -> list[dict[str, Any]]:
    dpo = {"loss": 0.7, "accuracy": 0.6, "chosen_logprob": -9.0, "rejected_logprob": None, "chosen_reward": 0.1}
    ppo = {"score": 0.4, "kl": 1.0, "entropy": 2.0, "end_rate": 1.0, "completion_tokens": 7.0}
    shared = stage(folder, f"SFT-{seed}0000001", {"loss": 1.0})
    sampled: dict[str, str] = {}
    if full:
        shared |= stage(folder, f"RewardModel-{seed}0000002", {"validation": JUDGED, "test": JUDGED})
        sampled |= stage(folder, f"Samples-{seed}0000003", {})
        sampled |= stage(folder, f"Selection-{seed}0000004", SELECTION)
        pairs = [{"prompt": "p", "gap": gap} for gap in (0.0, 0.5, 1.0, 2.1)]
        write_table(Path(sampled[f"Selection-{seed}0000004"]) / "all.parquet", pairs)
    arms = []
    for arm, values in scores.items():
        stages = shared | (sampled if arm != "sft" else {})
        if arm in ("mpo", "dpo"):
            stages |= stage(folder, f"DPO-{seed}0000005", {"pairs": 2, "accuracy": 0.9, "steps": 3}, [dpo] * 3)
        if arm in ("mpo", "ppo"):
            stages |= stage(folder, f"PPO-{seed}{arm}", {"score": 0.4, "kl": 1.0, "steps": 450}, [ppo] * 450)
        made = evaluation(folder, f"Evaluation-{seed}{arm}", [value + seed for value in values])
        model = str(folder / "cache" / arm / "model")
        (found,) = made.values()
        arms.append(result(arm, seed, "done", model=model, evaluation=found, stages=stages | made))
    if failed:
        reason = "PPO 1a2b3c4d: the KL ran away: <nan> & more"
        arms.append(result("dpo-base", seed, "failed", reason=reason, stages=shared))
    return arms


def result(arm: str, seed: int, status: str, **rest: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "status": status, **rest}


def page(folder: Path) -> str:
    path = write_page(load(folder))
    assert path == folder / "report.html"
    return path.read_text(encoding="utf8")


def section(text: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', text, re.DOTALL)
    assert found is not None
    return found[1]


def opening(text: str, name: str) -> str:
    found = re.search(r"<p>(.*?)</p>", section(text, name), re.DOTALL)
    assert found is not None
    return unescape(found[1])


def shifted(by: list[float]) -> list[float]:
    return [score + difference for score, difference in zip(SFT_SCORES, by, strict=True)]


CLEAR = {"sft": SFT_SCORES, "ppo": shifted([1.0] * 6), "mpo": shifted([2.0, 2.2, 1.9, 2.1, 2.0, 1.8])}
EVEN = {"sft": SFT_SCORES, "ppo": shifted([1.0] * 6), "mpo": shifted([2.0, 0.1, 1.9, 0.0, 1.6, 0.6])}
REVERSED = {"ppo": CLEAR["mpo"], "mpo": CLEAR["ppo"]}
EVEN_BELOW = {"ppo": EVEN["mpo"], "mpo": EVEN["ppo"]}


def test_page_has_every_section(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR))
    names = re.findall(r'<section id="([^"]*)">', text)
    expected = ["results", "reward-model", "selection", "training", "cost", "completions", "failed", "reproduce"]
    assert names == expected
    assert re.findall(r'<li><a href="#([^"]*)">', text) == expected
    assert "9.9.9" in text
    assert str(tmp_path / "cache" / "mpo" / "model") in text


def test_page_needs_no_network(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR))
    loads = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', text.replace(str(escape(HOSTILE)), ""))
    assert loads
    assert all(load.startswith("#") for load in loads), loads
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_completions_prompts_reasons_and_recipe_are_text(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert" in text
    assert text.count("<script>") == 1  # the page's own
    assert "question 0 &amp; &lt;b&gt;more" in text
    assert "earlier turn" in text
    assert unescape(section(text, "completions")).count(HOSTILE) == 3


def test_failed_arm_is_shown_with_its_reason(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR))
    failed = unescape(section(text, "failed"))
    assert "dpo-base" in failed
    assert "the KL ran away: <nan> & more" in failed
    assert "1 of 4 arms failed" in failed
    assert 'id="failed"' not in page(run_folder(tmp_path, CLEAR, failed=False))


@pytest.mark.parametrize(
    ("scores", "said"),
    [(CLEAR, "lies above zero"), (REVERSED, "lies below zero"), (EVEN, "holds zero"), (EVEN_BELOW, "holds zero")],
)
def test_first_sentence_claims_what_the_paired_interval_holds(
    tmp_path: Path, scores: dict[str, list[float]], said: str
) -> None:
    sentence = opening(page(run_folder(tmp_path, scores)), "results")
    paired = np.array(scores["mpo"]) - np.array(scores["ppo"])
    interval = bootstrap_mean(paired)
    assert f"{paired.mean():.2f} [{interval.low:.2f}, {interval.high:.2f}]" in sentence
    assert said in sentence
    assert sum(claim in sentence for claim in ("lies above zero", "lies below zero", "holds zero")) == 1
    assert "interval over prompts), " in sentence
    assert sentence.endswith("; one seed.")
    assert not re.search(r"\b(wins?|better|beats?|outperforms?)\b", sentence)


def test_verdict_at_the_edge() -> None:
    assert "holds zero" in verdict(Interval(0.1, 0.0, 0.2))
    assert "no interval" in verdict(Interval(0.1, float("nan"), float("nan")))


def test_main_table_against_means_by_hand(tmp_path: Path) -> None:
    table = main_table(load(run_folder(tmp_path, CLEAR)))
    rows = {row[0]: row for row in table.rows}
    headings = table.headings
    assert headings == ["arm", "reward", "KL from SFT", "tokens", "end rate", "win/tie/lose vs ppo"]
    for arm, mean in (("sft", "1.00"), ("ppo", "2.00"), ("mpo", "3.00")):
        assert rows[arm][1].startswith(f"{mean} [")
        assert rows[arm][2].startswith("1.25 [")  # (0 + 0.5 + ... + 2.5) / 6
        assert rows[arm][3] == "3.0"
        assert rows[arm][4] == "50%"
    assert rows["mpo"][5] == "100%/0%/0%"
    assert rows["sft"][5] == "0%/0%/100%"
    assert rows["dpo-base"][1] == "failed"


def test_differences_are_against_the_arm_of_the_first_sentence(tmp_path: Path) -> None:
    results = section(page(run_folder(tmp_path, CLEAR)), "results")
    found = dict(re.findall(r"<td>(\w+ − \w+)</td><td>([^<]*)</td>", results))
    assert found["sft − ppo"] == "-1.00 [-1.00, -1.00]"
    assert found["mpo − ppo"].startswith("1.00 [0.9")
    assert len(found) == 2


def test_openings_hold_the_figures(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR))
    assert "75% [41%, 93%] of 8 test pairs" in opening(text, "reward-model")
    assert "1 (25%) have a gap above the threshold of 1" in opening(text, "selection")
    assert "0.50 of the scores' spread" in opening(text, "selection")
    assert "DPO of mpo orders 90%" in opening(text, "training")
    assert "above that of ppo on 6 of them and below it on 0" in opening(text, "completions")
    assert "from 10 s (sft) to 60 s (mpo)" in opening(text, "cost")


def test_each_stage_is_plotted_once_and_missing_values_are_left_out(tmp_path: Path) -> None:
    scores = {**CLEAR, "dpo": SFT_SCORES}
    training = section(page(run_folder(tmp_path, scores)), "training")
    assert training.count("DPO-00000005") == 1
    assert "DPO of mpo, dpo" in training
    labels = re.findall(r'aria-label="([^"]*) by step', training)
    assert labels.count("score") == 2
    assert labels.count("loss") == 1
    assert "log-prob of a completion" not in labels


@pytest.mark.parametrize("scores", [{"sft": SFT_SCORES}, {"sft": [1.0]}, {}])
def test_page_of_a_run_with_little_in_it(tmp_path: Path, scores: dict[str, list[float]]) -> None:
    text = page(run_folder(tmp_path, scores, full=False))
    names = re.findall(r'<section id="([^"]*)">', text)
    assert "results" in names
    assert "selection" not in names
    assert "failed" in names


def test_several_seeds(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CLEAR, seeds=(0, 1)))
    assert "Seed 0 only" in section(text, "training")
    assert "DPO-10000005" not in section(text, "training")
    assert "DPO-10000005" in section(text, "cost")
    assert "each averaged over 2 seeds" in opening(text, "results")
    assert "2 of 8 runs of arms failed" in opening(text, "failed")
    table = main_table(load(tmp_path))
    assert next(row for row in table.rows if row[0] == "sft")[2] == "0.71"
    assert "sft, reward by seed: 1.00 2.00" in table.notes
    assert next(row for row in table.rows if row[0] == "sft")[1].startswith("1.50 [")


def test_page_is_the_same_twice(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, CLEAR)
    assert page(folder) == page(folder)


def test_load_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no results\.json"):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"format": -1}', encoding="utf8")
    with pytest.raises(InputError, match="format -1"):
        load(tmp_path)
