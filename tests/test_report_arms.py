"""The report's first section, on hand-made runs: means, differences, p-values, claims, and what may be said of them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mixpo.algorithms.intervals import Interval, compute_crossed_mean_interval
from mixpo.experiments.results import load_runs
from mixpo.report import arms, subsets
from mixpo.report.comparison import compare_arm_pairs, describe_difference, estimate_differences
from report_runs import CLEAR, SFT_SCORES, Arm, Writer, figure_rows, load, plain, rows, scores, shifted, table

EVEN = {"sft": SFT_SCORES, "ppo": shifted([1.0] * 6), "mpo": shifted([2.0, 0.1, 1.9, 0.0, 1.6, 0.6])}
REVERSED = {"ppo": CLEAR["mpo"], "mpo": CLEAR["ppo"]}
EVEN_BELOW = {"ppo": EVEN["mpo"], "mpo": EVEN["ppo"]}
CLAIMS = (
    "mpo has a significantly higher reward",
    "mpo has a significantly lower reward",
    "o significant difference between",
)


def many(mean: float, *, seed: int, prompts: int = 40, spread: float = 1.0) -> list[float]:
    """Values whose mean is `mean` exactly."""
    drawn = spread * np.random.default_rng(seed).normal(size=prompts)
    return [float(value) for value in drawn - drawn.mean() + mean]


@pytest.mark.parametrize(("values", "claim"), [(CLEAR, 0), (REVERSED, 1), (EVEN, 2), (EVEN_BELOW, 2)])
def test_first_sentence_claims_what_the_paired_interval_holds(
    tmp_path: Path, values: dict[str, list[float]], claim: int
) -> None:
    sentence = arms.build_results_section(load(tmp_path, plain(values))).opening
    paired = np.array(values["mpo"]) - np.array(values["ppo"])
    interval = compute_crossed_mean_interval(paired[None])
    evidence = f"({paired.mean():+.2f}, 95% CI [{interval.low:.2f}, {interval.high:.2f}], p "
    assert evidence.replace("-", "−") in sentence
    assert [sentence.count(text) for text in CLAIMS] == [int(place == claim) for place in range(3)]
    assert "over 6 prompts at one seed; other seeds may differ" in sentence
    assert not re.search(r"\b(wins?|better|beats?|outperforms?)\b", sentence)


def test_verdict_at_the_edge() -> None:
    def said(interval: Interval, p: float) -> str:
        return describe_difference("reward", "mpo", "ppo", interval, p)

    assert CLAIMS[0] in said(Interval(0.2, 0.1, 0.3), 0.01)
    assert CLAIMS[2] in said(Interval(0.1, -0.1, 0.3), 0.01)
    assert CLAIMS[2] in said(Interval(0.1, 0.0, 0.2), 0.01)
    assert CLAIMS[2] in said(Interval(-0.1, -0.2, 0.0), 0.01)
    assert CLAIMS[2] in said(Interval(0.1, 0.05, 0.2), 0.05)
    assert said(Interval(-0.1, -0.2, -0.05), 0.04) == f"{CLAIMS[1]} than ppo (−0.10, 95% CI [−0.20, −0.05], p 0.040)"
    assert "no interval" in said(Interval(0.1, math.nan, math.nan), 1.0)
    assert "reward (0.00, 95% CI [0.00, 0.00]" in said(Interval(-0.001, -0.002, 0.001), 0.5).replace("+", "")


def test_main_table_against_means_by_hand(tmp_path: Path) -> None:
    done = {name: scores(values, kl=[0.5 * n for n in range(6)]) for name, values in CLEAR.items()}
    results = load(tmp_path, [Arm(name, {0: columns}) for name, columns in done.items()])
    made = arms.build_main_table(results)
    found = rows(made)
    headings = ["arm", "reward", "KL from SFT", "tokens", "end rate", "win/tie/lose vs ppo"]
    assert made.headings == [*headings, "paper: HH-RLHF", "paper: TL;DR"]
    for arm, mean in (("sft", "1.00"), ("ppo", "2.00"), ("mpo", "3.00")):
        assert found[arm][1].startswith(f"{mean} [")
        assert found[arm][2].startswith("1.25 [")  # (0 + 0.5 + ... + 2.5) / 6
        assert found[arm][3] == "3.0"
        assert found[arm][4] == "50%"
    assert found["mpo"][5] == "100%/0%/0%"
    assert found["sft"][5] == "0%/0%/100%"
    assert found["ppo"][5] == ""
    assert found["mpo"][6:] == ["2.801", "3.784"]
    assert any(note.endswith("at one seed; other seeds may differ.") for note in made.notes)
    assert arms.build_main_table(results, with_paper_columns=False).headings == headings


def test_win_tie_lose_by_hand(tmp_path: Path) -> None:
    values = {"ppo": SFT_SCORES, "mpo": shifted([1.0, 0.0, -1.0, 0.0, 2.0, 1.0])}
    found = rows(arms.build_main_table(load(tmp_path, plain(values))))
    assert found["mpo"][5] == "50%/33%/17%"


def test_the_picture_of_every_arm_is_the_tables(tmp_path: Path) -> None:
    true = {"sft": [0.0] * 6, "ppo": [1.0] * 6, "mpo": [2.0] * 6}
    done = [Arm(name, {0: scores(values, true_reward=true[name])}) for name, values in CLEAR.items()]
    section = arms.build_results_section(load(tmp_path, [*done, Arm("dpo", failed={0: "lost"})]))
    drawn = figure_rows(section, "every-arm")
    assert [row[0] for row in drawn] == ["sft", "ppo", "mpo"]
    assert [round(row[1], 6) for row in drawn] == [round(float(np.mean(CLEAR[row[0]])), 6) for row in drawn]
    assert [row[4] for row in drawn] == [0.0, 1.0, 2.0]


def test_several_seeds(tmp_path: Path) -> None:
    results = load(tmp_path, plain(CLEAR, seeds=(0, 1, 3)))
    made = arms.build_main_table(results)
    sft = rows(made)["sft"]
    assert made.headings[1:3] == ["reward", "sd of reward"]
    assert sft[1].startswith("2.33 [")  # (1 + 2 + 4) / 3
    assert sft[2] == f"{np.std([1.0, 2.0, 4.0], ddof=1):.2f}"
    assert not any("one seed" in note for note in made.notes)
    assert "Intervals are over 6 prompts and 3 seeds;" in arms.build_results_section(results).opening


def test_differences_by_hand(tmp_path: Path) -> None:
    made = table(arms.build_results_section(load(tmp_path, plain(CLEAR))), "Differences")
    found = rows(made)
    assert list(found) == ["sft − ppo", "mpo − ppo", "sft − mpo"]
    assert found["sft − ppo"][1:3] == ["−1.00", "1.00"]  # the same on every prompt: no spread to tell from
    expected = scipy.stats.ttest_1samp([1.0, 1.2, 0.9, 1.1, 1.0, 0.8], 0.0).confidence_interval(0.95)
    assert found["mpo − ppo"][1] == f"1.00 [{expected.low:.2f}, {expected.high:.2f}]"


def test_p_values_of_five_seeds_are_students_and_survive_a_correction() -> None:
    by_seed = np.array([2.0, 2.1, 1.9, 2.2, 1.8])
    found = estimate_differences([("mpo", "ppo", np.repeat(by_seed[:, None], 50, axis=1))] * 20)
    t = scipy.stats.ttest_1samp(by_seed, 0.0)
    assert [one.p for one in found] == pytest.approx([20 * t.pvalue] * 20)
    assert found[0].p < 0.001
    expected = t.confidence_interval(0.95)
    assert (found[0].interval.low, found[0].interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("seeds", "said"), [(1, 0), (2, 2), (3, 2), (4, 0), (5, 0)])
def test_few_seeds_decide_only_what_they_hold(tmp_path: Path, seeds: int, said: int) -> None:
    """mpo is above ppo by 0.6 and 1.4 in turns: clear at a single seed, and again at four, not at two or three."""
    above = many(0.6, seed=8, spread=0.1), many(1.4, seed=9, spread=0.1)
    done = [
        Arm("ppo", {seed: scores(many(0.0, seed=seed)) for seed in range(seeds)}),
        Arm("mpo", {seed: scores(shifted(above[seed % 2], many(0.0, seed=seed))) for seed in range(seeds)}),
    ]
    results = load(tmp_path, done)
    (found,) = compare_arm_pairs(results, [("mpo", "ppo")], "score").values()
    assert CLAIMS[said] in arms.build_results_section(results).opening
    order = table(arms.build_results_section(results), "The paper's order").rows[0][3]
    assert order == {0: "confirmed" if seeds > 1 else "confirmed at this seed", 2: "not significant"}[said]
    assert (found.interval.low > 0) == (found.p < 0.05) == (said == 0)


def test_p_values_are_corrected_for_their_number(tmp_path: Path) -> None:
    values = {"ppo": [0.0] * 40, "mpo": many(0.4, seed=1), "dpo": many(0.3, seed=2), "sft": many(0.1, seed=3)}
    results = load(tmp_path, plain(values))
    pairs = [(name, "ppo") for name in ("mpo", "dpo", "sft")]
    single = sorted(compare_arm_pairs(results, [pair], "score")[pair].p for pair in pairs)
    together = sorted(found.p for found in compare_arm_pairs(results, pairs, "score").values())
    stepped = [single[0] * 3, max(single[0] * 3, single[1] * 2), max(single[0] * 3, single[1] * 2, single[2])]
    assert together == pytest.approx(stepped)


def test_the_papers_order_is_held_against_ours(tmp_path: Path) -> None:
    values = {"sft": many(1.0, seed=0), "ppo": many(2.0, seed=1), "mpo": many(2.05, seed=2)}
    values |= {"dpo-base": many(0.0, seed=3), "mpo-reverse": many(1.0, seed=4)}
    made = table(arms.build_results_section(load(tmp_path, plain(values))), "The paper's order")
    here = {row[0]: (row[1], row[3]) for row in made.rows}
    assert here == {
        "dpo-base > sft": ("Table 3", "reversed at this seed"),
        "mpo > ppo": ("Table 3", "not significant"),
        "mpo > mpo-reverse": ("Table 6", "confirmed at this seed"),
        "ppo > mpo-reverse": ("Table 6", "confirmed at this seed"),
    }
    assert "One seed: the order may differ at another." in made.notes
    assert "p corrected for the claims of the column, 4 at most" in made.notes[0]


def test_the_papers_figures_bear_out_the_papers_claims() -> None:
    for one, other, where in arms.PAPER_ORDER:
        for place, data in enumerate(("HH-RLHF", "TL;DR")):
            figures = [arms.PAPER_REWARDS.get(arm, ("", ""))[place] for arm in (one, other)]
            if all(figures) and (data in where or ", " not in where):
                assert float(figures[0]) > float(figures[1]), (one, other, data)
    assert ("mpo", "mpo-sft-kl", "Table 6") in arms.PAPER_ORDER
    # on TL;DR DPO on resampled pairs is below DPO-base
    assert arms.PAPER_REWARDS["dpo"][1] < arms.PAPER_REWARDS["dpo-base"][1]


@pytest.mark.parametrize(
    ("own", "changes", "weaker"),
    [
        ({"threshold": 2.0, "easy_fraction": None}, {"selection.threshold": 1.0}, True),
        ({"threshold": 2.0, "easy_fraction": None}, {"selection.threshold": 3.0}, False),
        ({"threshold": None, "easy_fraction": 0.3}, {"selection.easy_fraction": 0.5}, True),
        ({"threshold": None, "easy_fraction": 0.3}, {"selection.easy_fraction": 0.1}, False),
        ({"threshold": 2.0, "easy_fraction": None}, {"ppo.kl_coef": 0.05}, False),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_mpo_with_more_easy_pairs_is_the_papers_weaker_split(
    tmp_path: Path, own: dict[str, float], changes: dict[str, float], weaker: bool, several: bool
) -> None:
    point = Arm("mpo", {0: scores(SFT_SCORES)}, changes=changes)
    run = Writer(tmp_path / "run", recipe={"selection": own}).run([*plain(CLEAR), point])
    other = Writer(tmp_path / "other", name="other", cache="others").run(plain(CLEAR))
    results = load_runs(other, run) if several else load_runs(run)
    name = results.arm_names[-1]
    assert (arms.find_paper_arm(results, name) == "mpo at a weaker split") == weaker
    assert (rows(arms.build_main_table(results))[name][-2:] == ["2.22", "3.569"]) == weaker
    if several:
        assert arms.find_paper_arm(results, "other: mpo") == "mpo"


def test_the_best_arm_stands_to_ppo_and_mpo_as_the_table_has_it(tmp_path: Path) -> None:
    base = many(0.0, seed=0)
    values = {"sft": base, "ppo": shifted(many(1.0, seed=1), base), "mpo": shifted(many(1.1, seed=2), base)}

    def said(name: str, means: dict[str, list[float]]) -> str:
        section = arms.build_results_section(Writer(tmp_path / name, cache=name).load(plain(means)))
        found = rows(table(section, "Differences"))
        mean, bounds = found["mpo − ppo"][1].split(" ", 1)
        assert f"(+{mean}, 95% CI {bounds}, p {found['mpo − ppo'][2]})" in section.opening
        return re.split(r"\. (?=mpo|No|Int)", section.opening)[0]

    best = "{} has the highest mean reward of the {} arms"
    equal = "with no significant difference from"
    assert said("even", values) == best.format("mpo", 3) + f" (1.10), significantly above sft, {equal} ppo"
    clear = {**values, "mpo": shifted(many(3.0, seed=2), base)}
    assert said("clear", clear) == best.format("mpo", 3) + " (3.00), significantly above ppo and sft"
    other = {**values, "dpo": shifted(many(3.0, seed=4), base)}
    assert said("other", other) == best.format("dpo", 4) + " (3.00), significantly above ppo and mpo"
    near = {**values, "dpo": shifted(many(1.05, seed=4), base)}
    assert said("near", near) == best.format("mpo", 4) + f" (1.10), significantly above sft, {equal} ppo and dpo"


def test_an_arm_that_failed_everywhere_is_said_first(tmp_path: Path) -> None:
    results = load(tmp_path, [*plain({"sft": SFT_SCORES, "mpo": SFT_SCORES}), Arm("ppo", failed={0: "lost"})])
    assert arms.build_results_section(results).opening.startswith("mpo minus sft in reward is +0.00 on every prompt")


def test_the_best_arm_is_sought_among_those_with_every_seed(tmp_path: Path) -> None:
    done = plain({**CLEAR, "dpo": SFT_SCORES}, seeds=(0, 1))
    done[2] = Arm("mpo", {1: done[2].done[1]}, failed={0: "lost"})
    results = load(tmp_path, done)
    opening = arms.build_results_section(results).opening
    assert "ppo has the highest mean reward of the 3 arms without failed seeds (2.50)" in opening
    assert "over 6 prompts at one seed; other seeds may differ (1 of 2 seeds)" in opening
    assert "mpo − ppo (1 of 2 seeds)" in rows(table(arms.build_results_section(results), "Differences"))


def test_differences_are_of_the_seeds_that_both_finished(tmp_path: Path) -> None:
    """Seeds lie far apart: an average over unlike seeds would differ by more than the arms do."""
    one = Arm("mpo", {0: scores(shifted([1.0] * 6)), 2: scores(shifted([101.0] * 6))}, failed={1: "lost"})
    other = Arm("ppo", {0: scores(SFT_SCORES), 1: scores(shifted([50.0] * 6))}, failed={2: "lost"})
    results = load(tmp_path, [one, other])
    (found,) = compare_arm_pairs(results, [("mpo", "ppo")], "score").values()
    assert (found.seeds, found.interval.mean) == (1, 1.0)
    assert rows(arms.build_main_table(results))["mpo (failed at 1 of 3 seeds)"][-3] == "100%/0%/0% (1 of 3 seeds)"


def test_orders_of_figure_4(tmp_path: Path) -> None:
    base = many(0.0, seed=0)
    means = {"dpo-easy": 1.0, "dpo-hard": 0.0, "dpo": 2.0, "ppo-easy": 1.0, "ppo-hard": 1.0, "ppo": 1.02}
    values = {name: shifted(many(mean, seed=n), base) for n, (name, mean) in enumerate(means.items())}
    section = subsets.build_subsets_section(load(tmp_path, plain(values)))
    here = {row[0]: row[2] for row in table(section).rows}
    assert here == {
        "dpo-easy > dpo-hard": "confirmed at this seed",
        "dpo-easy > dpo": "reversed at this seed",
        "ppo > ppo-easy": "not significant",
        "ppo > ppo-hard": "not significant",
    }
    assert section.opening == (
        "Of the 4 differences in reward that the paper's Figure 4 shows, 1 are confirmed, 1 are reversed and 2 are not "
        "significant (at one seed)."
    )


def test_a_subset_that_failed_stays_in_figure_4(tmp_path: Path) -> None:
    done = plain({"dpo-easy": CLEAR["mpo"], "dpo": SFT_SCORES})
    section = subsets.build_subsets_section(load(tmp_path, [*done, Arm("dpo-hard", failed={0: "lost"})]))
    found = rows(table(section))
    assert found["dpo-easy > dpo-hard"] == ["dpo-easy > dpo-hard", "", "dpo-hard failed"]
    assert found["dpo-easy > dpo"][2] == "confirmed at this seed"
    assert "1 are not compared" in section.opening
    assert section.groups[0].notes == ["dpo-hard (failed at 1 of 1 seeds)."]
