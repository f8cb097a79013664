"""What the report says of reward models, selections, label noise, gradients and training, on hand-made stages."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from mixpo.data.world import true_reward
from mixpo.experiments.results import load_runs
from mixpo.report import noise, reward_model, selection, theorem, training
from mixpo.report.document import Section
from report_runs import (
    MARGINS,
    SFT_SCORES,
    Arm,
    Writer,
    figure_rows,
    load,
    pairs_of,
    plain,
    rows,
    scores,
    shifted,
    table,
)

ARMS = {"sft": SFT_SCORES, "mpo": SFT_SCORES}


def test_calibration_by_hand(tmp_path: Path) -> None:
    section = reward_model.build_reward_model_section(load(tmp_path, plain(ARMS)))
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin in MARGINS:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(4, int(confidence * 10 - 5)), []).append((confidence, float(margin > 0)))
    drawn = [(np.mean(pairs, axis=0).tolist(), len(pairs)) for _, pairs in sorted(bins.items())]
    found = figure_rows(section, "calibration")
    assert [row[1] for row in found] == [count for _, count in drawn]
    assert np.allclose([(row[0], row[2]) for row in found], [means for means, _ in drawn])
    error = sum(count * abs(predicted - seen) for (predicted, seen), count in drawn) / len(MARGINS)
    made = table(section)
    assert [(row[0], row[1], row[5]) for row in made.rows] == [
        ("seed 0", "validation", f"{error:.3f}"),
        ("seed 0", "test", f"{error:.3f}"),
    ]
    assert made.rows[1][3] == "75% [41%, 93%]"
    assert [row[:3] for row in figure_rows(section, "accuracy-by-gap-test")] == [
        ("0–1", 4, 0.75),
        ("1–2", 0, None),
        ("≥2", 4, 0.75),
    ]


@pytest.mark.parametrize(
    ("right", "pairs", "said"),
    [
        ([6], 6, "significantly above chance"),  # 61% at least
        ([6, 6], 6, "significantly above chance"),  # two seeds that judge the same pairs are no more certain
        ([30], 40, "significantly above chance"),
        ([10], 40, "significantly below chance"),
        ([21], 40, "not significantly different from chance"),
        ([40, 20], 40, "not significantly different from chance"),
    ],
)
def test_accuracy_is_held_against_chance(tmp_path: Path, right: list[int], pairs: int, said: str) -> None:
    margins = {seed: [0.5] * count + [-1.5] * (pairs - count) for seed, count in enumerate(right)}
    results = load(tmp_path, plain(ARMS, seeds=list(margins)), margins=margins)
    opening = reward_model.build_reward_model_section(results).opening
    share, sample = sum(right) / len(right) / pairs, "and 2 seeds" if len(right) > 1 else "at one seed"
    assert opening.startswith(f"The reward model agrees with {share:.0%} of the labels of {pairs} test pairs (95% CI [")
    assert f"] over pairs {sample}), {said}; {share:.0%} of the pairs have a gap under 1." in opening
    low, high = proportion_confint(right[0], pairs, method="wilson")
    assert (f"[{low:.0%}, {high:.0%}]" in opening) == (right.count(right[0]) == len(right))


def test_the_second_reward_model_bears_its_name_and_is_not_the_first(tmp_path: Path) -> None:
    arms = [Arm("sft", {0: scores(SFT_SCORES, second_score=SFT_SCORES)})]
    margins = {0: [-1.0] * 40}  # the second has MARGINS
    section = reward_model.build_reward_model_section(load(tmp_path, arms, second=True, margins=margins))
    assert [row[0] for row in table(section).rows] == ["seed 0", "seed 0", "seed 0, second", "seed 0, second"]
    assert "of the labels of 40 test pairs" in section.opening


def test_alarms_are_told(tmp_path: Path) -> None:
    alarms = {"RewardModel-0": ["noise"], "PPO-0mpo": ["ran"], "DPO-0easy": ["fell", "grew"]}
    results = load(tmp_path, plain(ARMS), alarms=alarms)
    section = reward_model.build_reward_model_section(results)
    assert section.groups[0].notes == ["Alarm, seed 0: noise."]
    trained = training.build_training_section(results)
    assert "of all seeds and sweeps raised 3 alarms;" in trained.opening
    assert trained.groups[0].notes[:3] == [
        "Alarm, DPO of mpo (seed 0): fell.",
        "Alarm, DPO of mpo (seed 0): grew.",
        "Alarm, PPO of mpo (seed 0): ran.",
    ]


def shares(pairs: Sequence[dict[str, object]]) -> tuple[int, int, int]:
    """Right, wrong and tied by the true reward."""
    signs = []
    for row in pairs:
        (prompt,), (chosen, rejected) = row["prompt"], row["completions"]  # type: ignore[misc]
        signs.append(np.sign(true_reward(prompt["content"], chosen) - true_reward(prompt["content"], rejected)))
    return signs.count(1), signs.count(-1), signs.count(0)


def test_right_and_wrong_labels_by_the_true_reward(tmp_path: Path) -> None:
    easy, hard = pairs_of([2.5] * 30), pairs_of([0.0] * 5 + [0.1 + n / 20 for n in range(35)])
    section = selection.build_selection_section(load(tmp_path, plain(ARMS), world=True, pairs=(easy, hard)))
    made = table(section)
    row = dict(zip(made.headings, made.rows[0], strict=True))
    assert [row[name] for name in ("selection", "pairs", "easy", "hard")] == ["seed 0", "70", "30", "40"]
    assert row["median gap / score sd"] == "0.50"
    for part, pairs in (("easy", easy), ("hard", hard)):
        right, wrong, tied = shares(pairs)
        assert right > wrong > 0
        low, high = proportion_confint(right, right + wrong, method="wilson")
        said = f"{right / (right + wrong):.0%} [{low:.0%}, {high:.0%}] ({tied} tied)"
        assert row[f"correct {part} labels"] == said
        assert f"{right / (right + wrong):.0%} of the {part} labels" in section.opening
    assert shares(hard)[2] >= 5
    assert "30 (43%) have a gap above 2 and are easy; the median gap is 0.75" in section.opening
    assert sum(row[2] for row in figure_rows(section, "gaps")) == 40
    assert sum(row[3] for row in figure_rows(section, "gaps")) == 30


def test_labels_that_are_all_tied_have_no_share(tmp_path: Path) -> None:
    pairs = pairs_of([2.5]), pairs_of([0.0] * 3)
    section = selection.build_selection_section(load(tmp_path, plain(ARMS), world=True, pairs=pairs))
    assert table(section).rows[0][-1] == "none (3 tied)"
    assert "no hard labels" in section.opening


def test_elsewhere_no_label_is_called_right(tmp_path: Path) -> None:
    section = selection.build_selection_section(load(tmp_path, plain(ARMS)))
    assert "confirms" not in section.opening
    assert "correct" not in " ".join(table(section).headings)


@pytest.mark.parametrize(("count", "shown"), [(2, [1, 2]), (5, [5, 4, 1, 2, 3]), (9, [9, 8, 7, 1, 2, 3])])
def test_pairs_from_both_ends_each_once(tmp_path: Path, count: int, shown: list[int]) -> None:
    pairs = [], pairs_of([0.0, *(n / 10 for n in range(1, count + 1))])
    section = selection.build_selection_section(load(tmp_path, plain(ARMS), pairs=pairs))
    found = table(section, "Pairs with the largest and the smallest gaps (seed 0)").rows
    assert [float(row[0]) for row in found] == pytest.approx([n / 10 for n in shown])


def test_runs_that_share_samples_have_selections_of_their_own(tmp_path: Path) -> None:
    """The second run's samples were found in the cache, where the first run's recipe put them."""
    one = Writer(tmp_path / "one", name="a").run(plain({"mpo": SFT_SCORES}))
    two = Writer(tmp_path / "two", name="b").run(plain({"dpo-easy": SFT_SCORES}))
    results = (two / "results.json").read_text()
    (tmp_path / "cache" / "Selection-0").rename(tmp_path / "cache" / "Selection-other")
    (two / "results.json").write_text(results.replace("Selection-0", "Selection-other"))
    Writer(tmp_path / "one", name="a").run(plain({"mpo": SFT_SCORES}))
    section = selection.build_selection_section(load_runs(one, two))
    assert [row[0] for row in table(section).rows] == ["a, seed 0", "b, seed 0"]


def noisy(seeds: Sequence[int] = (0,)) -> list[Arm]:
    """Rewards of two arms at three shares of flipped labels; prompts differ, falls do not but for mpo's last."""
    means = {
        "mpo": {0.0: [2.0] * 6, 0.1: [1.9] * 6, 0.3: [1.9, 1.7, 1.9, 1.7, 1.9, 1.7]},
        "dpo-base": {0.0: [1.0] * 6, 0.1: [0.5] * 6, 0.3: [0.25] * 6},
    }
    return [
        Arm(
            name,
            {seed: scores(shifted([value + 10 * seed for value in values])) for seed in seeds},
            changes={"label_noise.share": share} if share else {},
        )
        for name, levels in means.items()
        for share, values in levels.items()
    ]


def test_changes_by_label_noise_by_hand(tmp_path: Path) -> None:
    section = noise.build_label_noise_section(load(tmp_path, noisy()))
    made = table(section, "reward")
    found = rows(made)
    assert made.headings[1:] == ["0% flipped", "10% flipped", "30% flipped", "change from 0% to 30%"]
    assert [text.split()[0] for text in found["mpo"][1:]] == ["3.00", "2.90", "2.80", "−0.20"]
    assert found["dpo-base"][4] == "−0.75"  # the same on every prompt
    assert section.opening.startswith("From 0% to 30% flipped labels, the changes in reward are: mpo −0.20 [−0.")
    said = "dpo-base −0.75; mpo has a significantly higher change in reward than dpo-base (+0.55, 95% CI ["
    assert said in section.opening
    assert section.opening.count("significantly higher") == 1
    drawn = [(row[0], row[2], round(row[5], 6)) for row in figure_rows(section, "noise-score")]
    assert drawn[:3] == [("mpo", 0.0, 3.0), ("mpo", 0.1, 2.9), ("mpo", 0.3, 2.8)]


def test_noise_that_failed_is_told_and_not_averaged_over(tmp_path: Path) -> None:
    arms = noisy(seeds=(0, 1))
    lost = {0: "lost", 1: "lost"}
    arms[2] = Arm("mpo", {0: arms[2].done[0]}, failed={1: "lost"}, changes=arms[2].changes)
    arms[4] = Arm("dpo-base", failed=lost, changes=arms[4].changes)
    arms += [Arm("dpo", {0: scores(SFT_SCORES)}), Arm("dpo", failed=lost, changes={"label_noise.share": 0.3})]
    arms += plain({"ppo": SFT_SCORES})
    arms.append(Arm("ppo", {0: scores([0.0] * 6)}, changes={"label_noise.share": 0.1}))
    section = noise.build_label_noise_section(load(tmp_path, arms))
    found = rows(table(section, "reward"))
    assert found["ppo"][2].startswith("0.00")
    assert found["ppo"][3:] == ["", ""]
    assert found["mpo"][3].startswith("2.80 [")
    assert found["mpo"][3].endswith("] (1 of 2 seeds)")
    assert found["mpo"][4].startswith("−0.20 [")  # of seed 0, not -5.2 against the mean of both
    assert found["mpo"][4].endswith("] (1 of 2 seeds)")
    assert found["dpo-base"][2] == "failed"
    assert found["dpo"][3:] == ["failed", ""]
    assert "mpo −0.20 [" in section.opening
    assert "not measured at both shares: dpo, ppo" in section.opening
    assert "than ppo" not in section.opening
    assert "p <0.001) (1 of 2 seeds)" in section.opening


def gradients(one: tuple[float, float], other: tuple[float, float], *, x: tuple[float, float]) -> dict[str, float]:
    """A row of two 2-vectors, x_w and x_l with the closed-form gradients of DPO's loss at beta 0.1."""
    a, b, beta = np.array(one), np.array(other), 0.1
    w, lost = x
    total = w**beta + lost**beta
    return {
        "log_x_chosen": math.log(w),
        "log_x_rejected": math.log(lost),
        "by_chosen": -beta * lost**beta / (w * total),
        "by_rejected": beta * lost ** (beta - 1) / total,
        "chosen_chosen": float(a @ a),
        "rejected_rejected": float(b @ b),
        "chosen_rejected": float(a @ b),
    }


APART = gradients((2.0, 0.0), (0.0, 1.0), x=(2.0, 0.5))
"""At right angles: a step moves both the right way, the log-probs as 4 to 1."""
TOGETHER = gradients((2.0, 0.0), (1.0, 0.0), x=(1.0, 1.5))
"""g_w = 2 g_l: a step along g_w - g_l raises the rejected log-prob too."""


def measured(folder: Path, *parts: tuple[str, str, int, list[dict[str, float]] | str]) -> Section:
    """The section of measurements: arm, part, seed, and rows of gradients or the reason why there are none."""
    writer, seeds = Writer(folder / "run"), sorted({0, *(seed for _, _, seed, _ in parts)})
    results = writer.load(plain(ARMS, seeds=seeds), [writer.gradients(*one) for one in parts])
    return theorem.build_theorem_section(results)


def test_gradients_by_hand(tmp_path: Path) -> None:
    section = measured(tmp_path, ("dpo-easy", "easy", 0, [APART] * 2), ("dpo-easy", "hard", 0, [TOGETHER] * 2))
    made = table(section)
    easy, hard = (dict(zip(made.headings, row, strict=True)) for row in made.rows)
    assert (easy["measured on"], easy["seeds"], easy["pairs"]) == ("easy", "1", "2")
    assert easy["median x_l / x_w"] == "0.25"
    assert hard["median x_l / x_w"] == "1.5"
    assert float(easy["largest error of Corollary 1 (log)"]) < 1e-12
    assert easy["cosine of the two gradients"] == "0.00"  # alike, so without an interval
    assert hard["cosine of the two gradients"] == "1.00"
    assert easy["relative norm of DPO's gradient"] == f"{5**0.5 / 3:.2f}"  # |(2, -1)| / (2 + 1)
    assert hard["relative norm of DPO's gradient"] == "0.33"  # |(1, 0)| / (2 + 1)
    assert easy["a step raises chosen and lowers rejected"].startswith("100% [")
    assert hard["a step raises chosen and lowers rejected"].startswith("0% [")
    assert easy["median rise / fall of log-probs"] == "4.00"
    assert hard["median rise / fall of log-probs"] == ""
    assert "is 0.00 on easy and 1.00 on hard pairs, a difference of 1.00" in section.opening
    assert section.opening.endswith("without an interval.")
    assert "x_l / x_w from 0.25 to 1.5" in section.opening


def test_a_step_against_a_small_step_of_the_weights() -> None:
    """x_w over x_l by the columns, and by moving the weights of two linear log-probs along g_w - g_l."""
    one, other, x, rate = np.array([2.0, 0.3]), np.array([-0.4, 1.0]), (2.0, 0.5), 1e-6
    row = gradients((2.0, 0.3), (-0.4, 1.0), x=x)
    made = theorem.PairGradientStatistics("dpo", "easy", {})
    vars(made)["columns"] = {name: np.array([value]) for name, value in row.items()}
    step = rate * (one - other)
    rise, fall = x[0] * math.expm1(one @ step), -x[1] * math.expm1(other @ step)
    assert made.log_step_ratio[0] == pytest.approx(math.log(rise / fall), abs=1e-4)
    assert made.moves_both_as_intended[0] == 1.0


def test_a_wrong_corollary_would_be_seen(tmp_path: Path) -> None:
    wrong = {**APART, "by_chosen": 2 * APART["by_chosen"]}
    section = measured(tmp_path, ("dpo", "easy", 0, [APART, wrong]))
    assert table(section).rows[0][5] == f"{math.log(2):.0e}"
    assert "differs by at most 7e-01 in its logarithm" in section.opening
    assert "Remark" not in section.opening  # no hard pairs were measured


def cosine(value: float) -> dict[str, float]:
    return gradients((1.0, 0.0), (value, math.sqrt(1 - value**2)), x=(1.0, 1.0))


def test_several_seeds_are_held_apart_by_students_t(tmp_path: Path) -> None:
    """The three models are measured on the same pairs: many rows are no more evidence than the seeds they are of."""
    apart = [0.1, 0.3, 0.05]
    parts = [
        (arm, part, seed, [cosine(0.2 if part == "easy" else 0.2 + by)] * 30)
        for arm in ("dpo", "dpo-easy", "dpo-hard")
        for seed, by in enumerate(apart)
        for part in ("easy", "hard")
    ]
    section = measured(tmp_path, *parts)
    expected = scipy.stats.ttest_1samp(apart, 0.0).confidence_interval(0.95)
    said = f"{np.mean(apart):.2f} [{expected.low:.2f}, {expected.high:.2f}] (95% interval over 3 seeds)"
    said = said.replace("-", "\u2212")
    assert section.opening.endswith(f"a difference of {said}, not significant.")
    row = next(row for row in table(section).rows if row[:2] == ["dpo", "hard"])
    assert row[6].startswith(f"{0.2 + np.mean(apart):.2f} [{expected.low + 0.2:.2f}")
    assert row[2:4] == ["3", "90"]


@pytest.mark.parametrize(
    ("hard", "said"),
    [
        ([0.8, 0.7, 0.75], "significant, as Remark 1 says"),
        ([-0.8, -0.7, -0.75], "significant, against Remark 1"),
        ([0.1, 0.3], "not significant"),
    ],
)
def test_one_seed_is_told_apart_by_its_pairs(tmp_path: Path, hard: list[float], said: str) -> None:
    """Each part's variance with Student's quantile of its own pairs."""
    easy = [0.1, 0.2, 0.15]
    parts = ("dpo", "easy", 0, list(map(cosine, easy))), ("dpo", "hard", 0, list(map(cosine, hard)))
    section = measured(tmp_path, *parts)
    half = sum((scipy.stats.t.ppf(0.975, len(part) - 1) * scipy.stats.sem(part)) ** 2 for part in (easy, hard)) ** 0.5
    mean = np.mean(hard) - np.mean(easy)
    text = f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}] (95% interval over pairs at one seed), {said}."
    assert section.opening.endswith("a difference of " + text.replace("-", "\u2212", text.split("(")[0].count("-")))


def test_models_measured_on_one_part_only_do_not_move_the_difference(tmp_path: Path) -> None:
    both = [("dpo", part, 0, [cosine(0.5)] * 3) for part in ("easy", "hard")]
    one = ("dpo-hard", "easy", 0, [cosine(0.0)] * 3), ("dpo-hard", "hard", 0, "out of memory")
    section = measured(tmp_path, *both, *one)
    assert "is 0.50 on easy and 0.50 on hard" in section.opening
    assert "gradients of dpo-hard on hard pairs (seed 0): out of memory" in table(section).notes


def test_gradients_that_all_failed_are_told(tmp_path: Path) -> None:
    section = measured(tmp_path, ("dpo", "easy", 0, "out of memory"))
    assert section.opening == "No gradients could be measured."
    assert section.groups[0].notes == ["gradients of dpo on easy pairs (seed 0): out of memory"]
    assert measured(tmp_path / "none") is None


def test_each_stage_is_plotted_once_and_missing_values_are_left_out(tmp_path: Path) -> None:
    values = {**ARMS, "dpo-easy": SFT_SCORES, "ppo": SFT_SCORES}
    section = training.build_training_section(load(tmp_path, plain(values, seeds=(0, 1))))
    assert section.opening == (
        "The stages of all seeds and sweeps raised no alarm; the curves are of 1 DPO stage and 2 PPO stages of seed 0."
    )
    assert [one.name for group in section.groups for one in group.figures] == ["dpo-loss", "ppo-score"]
    assert figure_rows(section, "dpo-loss") == [("mpo", float(step), 0.7 - 0.001 * step) for step in range(4)]
    assert section.groups[1].notes == [
        "Not plotted, because constant: accuracy on its pairs 0.6; log-prob of chosen −9."
    ]
    assert rows(table(section, "PPO"))["ppo"][:4] == ["ppo", "2", "3", "4"]


def test_curves_are_of_the_first_seed_that_has_any(tmp_path: Path) -> None:
    arms = [Arm("sft", {0: scores(SFT_SCORES), 1: scores(SFT_SCORES)}), Arm("ppo", {1: scores(SFT_SCORES)})]
    section = training.build_training_section(load(tmp_path, arms))
    assert "of seed 1." in section.opening
    assert training.build_training_section(load(tmp_path / "sft", plain({"sft": SFT_SCORES}))) is None


def test_scores_of_two_reward_models_share_no_axis_and_sft_may_alarm(tmp_path: Path) -> None:
    arms = {"a": plain(ARMS), "b": plain({"sft": SFT_SCORES, "ppo": SFT_SCORES})}
    runs = [Writer(tmp_path / name, name=name, reward=name, cache=f"{name}-cache").run(arms[name]) for name in arms]
    section = training.build_training_section(load_runs(*runs))
    assert {one.name: {row[0] for row in one.rows} for one in section.groups[2].figures} == {
        "ppo-score-1": {"a: mpo"},
        "ppo-score-2": {"b: ppo"},
    }
    results = load(tmp_path / "one", plain({**ARMS, "ppo": SFT_SCORES}))
    next(arm for arm in results.arms if arm.arm == "ppo").reward_models.clear()  # as of one whose evaluation is missing
    section = training.build_training_section(results)
    assert {row[0] for row in figure_rows(section, "ppo-score")} == {"mpo", "ppo"}
    alone = load(tmp_path / "sft", plain({"sft": SFT_SCORES}), alarms={"SFT-0": ["rose"]})
    section = training.build_training_section(alone)
    assert section.opening == "The stages of all seeds and sweeps raised 1 alarm."
    assert section.groups[0].notes[0] == "Alarm, SFT of sft (seed 0): rose."


def test_points_of_a_sweep_stand_in_the_table_but_are_not_drawn(tmp_path: Path) -> None:
    point = Arm("mpo", {0: scores(SFT_SCORES)}, changes={"ppo.kl_coef": 0.5})
    section = training.build_training_section(load(tmp_path, [*plain(ARMS), point], alarms={"PPO-0mpo0.5": ["ran"]}))
    assert {row[0] for row in figure_rows(section, "ppo-score")} == {"mpo"}
    assert list(rows(table(section, "PPO"))) == ["mpo", "mpo ppo.kl_coef=0.5"]
    assert section.groups[0].notes[0] == "Alarm, PPO of mpo ppo.kl_coef=0.5 (seed 0, ppo.kl_coef=0.5): ran."


def test_a_step_moves_x_against_the_corollary_where_gradients_are_alike(tmp_path: Path) -> None:
    """Orthogonal gradients of one length move both log-probs alike, so x_w rises by x_w / x_l of the fall of x_l."""
    pairs = [gradients((1.0, 0.0), (0.0, 1.0), x=(w, 1.0)) for w in (0.5, 2.0, 8.0)]
    section = measured(tmp_path, ("dpo", "easy", 0, pairs))
    for row, w in zip(figure_rows(section, "corollary-1-step"), (0.5, 2.0, 8.0), strict=True):
        assert row[1:] == pytest.approx((-math.log(w), math.log(w)))
    assert any("Over 3 pairs" in note and "correlation of −1.00" in note for note in table(section).notes)


def test_pictures_of_the_reward_model_pool_the_seeds(tmp_path: Path) -> None:
    margins = {0: [0.1, -0.1, 0.1, 0.1], 1: [0.1, -0.1, -0.1, 0.1]}
    results = load(tmp_path, plain(ARMS, seeds=(0, 1)), margins=margins)
    section = reward_model.build_reward_model_section(results)
    assert [row[0] for row in table(section).rows] == ["seed 0", "seed 0", "seed 1", "seed 1"]
    pooled, *each = figure_rows(section, "calibration")
    assert (pooled[1], pooled[2], pooled[-1]) == (8, 5 / 8, "")
    growth = 1 + scipy.stats.t.ppf(0.975, 1) ** 2 * (0.125**2) / (1.959964**2 * (5 / 8 * 3 / 8) / 4)
    low, high = proportion_confint(5 / 8 * 4 / growth, 4 / growth, method="wilson")  # two seeds of 4 pairs: 3/4, 2/4
    assert pooled[3:5] == pytest.approx((low, high), rel=1e-4)
    assert [(row[1], row[2], row[-1]) for row in each] == [(4, 0.75, "seed 0"), (4, 0.5, "seed 1")]
    rows = figure_rows(section, "accuracy-by-gap-test")
    assert [row[:3] for row in rows[:3]] == [("0–1", 8, 0.75), ("1–2", 0, None), ("≥2", 8, 0.75)]
    assert [row[-1] for row in rows] == ["", "", "", *["seed 0"] * 3, *["seed 1"] * 3]
    assert section.groups[1].notes[0].startswith("Bold: 2 seeds together; thin: each seed.")


def test_selections_of_seeds_are_told_as_ranges_and_drawn_together(tmp_path: Path) -> None:
    easy, hard = pairs_of([2.5] * 30), pairs_of([0.5] * 40)
    writer = Writer(tmp_path / "run", world=True, pairs=(easy, hard))
    writer.run(plain(ARMS, seeds=(0, 1)))
    file = tmp_path / "cache" / "Selection-1" / "summary.json"
    file.write_text(file.read_text().replace('"easy": 30', '"easy": 21').replace('"threshold": 2.0', '"threshold": 1'))
    section = selection.build_selection_section(load_runs(tmp_path / "run"))
    assert section.opening.startswith(
        "Of 70 pairs sampled from SFT at each of 2 seeds, 21 to 30 (30% to 43%) have a gap above 1 to 2 and are easy; "
        "the median gap is 0.75. The true r* confirms"
    )
    assert [sum(row[place] for row in figure_rows(section, "gaps")) for place in (2, 3)] == [80, 60]
    assert section.groups[1].title == "Gaps (2 seeds together)"
