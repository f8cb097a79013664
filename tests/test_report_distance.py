"""Reward against KL, along training and against cost, on hand-made runs whose answers are known."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.experiments.results import load_runs
from mixpo.experiments.run import ArmResult
from mixpo.report import cost, distance, overoptimisation
from mixpo.report.document import Section
from mixpo.report.traces import load_ppo_traces
from report_runs import SFT_SCORES, Arm, Columns, Writer, figure_rows, load, plain, rows, scores, table

NOISE = [0.3, -0.3, 0.5, -0.5, 0.1, -0.1, 0.7, -0.7]
TILT = [1, 1, -1, -1, 1, -1, -1, 1]


def around(mean: float, *, kl: float | Sequence[float] = 1.0, **means: float) -> Columns:
    """A mean with noise that every arm shares, so that paired differences vary by a thousandth of themselves alone."""
    columns = {
        name: [(1.0 + 0.001 * tilt) * one + noise for tilt, noise in zip(TILT, NOISE, strict=True)]
        for name, one in {"score": mean, **means}.items()
    }
    return scores(columns.pop("score"), kl=kl, **columns)


def ppo_curve(seeds: Sequence[int] = (0,)) -> list[Arm]:
    """PPO at kl_coef 0.2, 0.1, 0.05: 1, 2, 3 nats from SFT at rewards 1, 1.6, 2 and true rewards 1, 1.2, 0.8."""
    points = {0.2: (1.0, 1.0, 1.0), 0.1: (2.0, 1.6, 1.2), 0.05: (3.0, 2.0, 0.8)}
    return [
        Arm(
            "ppo",
            {seed: around(reward + seed, kl=kl, true_reward=true) for seed in seeds},
            changes={} if coef == 0.1 else {"ppo.kl_coef": coef},
        )
        for coef, (kl, reward, true) in points.items()
    ]


def test_equal_kl_by_hand(tmp_path: Path) -> None:
    """At 2.5 nats PPO's lines are at reward 1.8 and true reward 1.0, half way in the log of kl_coef."""
    mpo = Arm("mpo", {0: around(2.0, kl=2.5, true_reward=0.9)})
    near = Arm("dpo", {0: around(0.4, kl=1.25, true_reward=1.15)})
    section = distance.build_distance_section(load(tmp_path, [*ppo_curve(), mpo, near]))
    found = rows(table(section, "At equal KL, by PPO's sweep"))
    assert found["mpo − ppo"][1:6] == ["1", "2.50", "1.00 to 3.00", f"{(0.1 * 0.05) ** 0.5:.3g}", "0.20 [0.20, 0.20]"]
    assert found["mpo − ppo"][7] == "−0.10 [−0.10, −0.10]"
    assert found["dpo − ppo"][4:6] == [f"{0.2**0.75 * 0.1**0.25:.3g}", "−0.75 [−0.75, −0.75]"]
    assert found["dpo − ppo"][7] == "0.10 [0.10, 0.10]"
    assert section.opening == (
        "At equal KL, mpo has a significantly higher reward than ppo (+0.20, 95% CI [0.20, 0.20], p <0.001); mpo has a "
        "significantly lower true r* than ppo (−0.10, 95% CI [−0.10, −0.10], p <0.001). mpo ends 2.50 nats from SFT, "
        "which PPO reaches at a kl_coef of about 0.071; intervals are over 8 prompts at one seed; other seeds may "
        "differ."
    )


def test_equal_kl_carries_the_uncertainty_of_the_distance(tmp_path: Path) -> None:
    """Where only MPO's KL varies, its interval is that of PPO's reward along its line of slope 0.4."""
    kls = [2.5 + noise for noise in NOISE]
    results = load(tmp_path, [*ppo_curve(), Arm("mpo", {0: around(2.0, kl=kls)})])
    (found,) = distance.compare_at_equal_kl(results)
    interval = found.differences["score"].interval
    drawn = np.random.default_rng(1).choice(kls, size=(20_000, len(kls))).mean(axis=1)
    low, high = np.quantile(2.0 - (1.6 + 0.4 * (drawn - 2.0)), [0.025, 0.975])
    assert interval.mean == pytest.approx(0.2)
    assert interval.low < low < high < interval.high
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.06)


def test_degrees_of_freedom_at_equal_kl_are_of_all_that_varies() -> None:
    """The linear form's spread is that of the interpolated difference over resampled prompts, KL's part included."""
    generator = np.random.default_rng(4)
    prompts = 400
    kls = np.array([3.0, 1.0, 2.0, 2.3])[:, None] + generator.normal(size=(4, prompts))
    values = np.array([2.0, 0.0, 1.5, 1.9])[:, None] + 0.3 * generator.normal(size=(4, prompts))
    drawn = generator.integers(prompts, size=(4000, prompts))
    found = []
    for places in drawn:
        x, y = kls[:, places].mean(axis=1), values[:, places].mean(axis=1)
        found.append(y[3] - np.interp(x[3], x[[1, 2, 0]], y[[1, 2, 0]]))
    linear = distance._linearize_difference_at_equal_kl(kls[:, None], values[:, None])
    assert np.std(linear) / prompts**0.5 == pytest.approx(np.std(found), rel=0.1)


@pytest.mark.parametrize("kl", [0.5, 4.0, [3.05 + noise for noise in NOISE], [2.9 + noise for noise in NOISE]])
def test_nothing_is_said_where_ppos_sweep_does_not_reach(tmp_path: Path, kl: float | list[float]) -> None:
    section = distance.build_distance_section(load(tmp_path, [*ppo_curve(), Arm("mpo", {0: around(2.0, kl=kl)})]))
    (row,) = table(section, "At equal KL, by PPO's sweep").rows
    assert row[3] == "1.00 to 3.00"
    assert len(row) == 5  # no measure has a difference
    assert "reaches only 1.00 to 3.00" in section.opening
    assert "significant" not in section.opening


def test_equal_kl_is_of_the_seeds_that_the_whole_sweep_finished(tmp_path: Path) -> None:
    sweep = ppo_curve(seeds=(0, 1))
    sweep[2] = Arm("ppo", {1: sweep[2].done[1]}, failed={0: "lost"}, changes=sweep[2].changes)
    mpo = Arm("mpo", {0: around(50.0, kl=2.5), 1: around(3.0, kl=2.5)})
    section = distance.build_distance_section(load(tmp_path, [*sweep, mpo]))
    (row,) = table(section, "At equal KL, by PPO's sweep").rows
    assert (row[1], row[5]) == ("1", "0.20 [0.20, 0.20]")
    assert "intervals are over 8 prompts at one seed; other seeds may differ (1 of 2 seeds)." in section.opening


def test_equal_kl_within_each_of_two_runs(tmp_path: Path) -> None:
    one = Writer(tmp_path / "one", name="a").run([*ppo_curve(), Arm("mpo", {0: around(2.0, kl=2.5)})])
    two = Writer(tmp_path / "two", name="b", cache="c").run([*ppo_curve(), Arm("mpo", {0: around(1.0, kl=2.5)})])
    found = rows(table(distance.build_distance_section(load_runs(one, two)), "At equal KL, by PPO's sweep"))
    assert {name: row[5] for name, row in found.items()} == {
        "a: mpo − a: ppo": "0.20 [0.20, 0.20]",
        "b: mpo − b: ppo": "−0.80 [−0.80, −0.80]",
    }


def test_a_sweep_to_no_penalty_has_a_kl_coef(tmp_path: Path) -> None:
    sweep = [Arm("ppo", {0: around(2.0, kl=3.0)}, changes={"ppo.kl_coef": 0.0}), Arm("ppo", {0: around(1.0, kl=1.0)})]
    (found,) = distance.compare_at_equal_kl(load(tmp_path, [*sweep, Arm("mpo", {0: around(2.0, kl=2.0)})]))
    assert found.coef == pytest.approx(0.05)


def test_without_a_sweep_only_distances_are_told(tmp_path: Path) -> None:
    done = [Arm("sft", {0: around(0.0, kl=0.0)}), Arm("ppo", {0: around(1.0, kl=1.5)})]
    section = distance.build_distance_section(load(tmp_path, [*done, Arm("mpo", {0: around(2.0, kl=2.5)})]))
    assert "between 1.50 (ppo) and 2.50 (mpo) nats from SFT" in section.opening
    assert figure_rows(section, "kl-score")[2][:2] == ("mpo", 2.5)
    assert "significant" not in section.opening


def test_the_same_budget(tmp_path: Path) -> None:
    budgets = [
        Arm(name, {0: around(reward, kl=kl)}, changes={"ppo.kl_budget": 2.0})
        for name, reward, kl in (("ppo", 1.0, 2.1), ("mpo", 1.5, 1.9))
    ]
    lost = Arm("mpo-sft-kl", failed={0: "lost"}, changes={"ppo.kl_budget": 2.0})
    alone = Arm("mpo", {0: around(9.0)}, changes={"ppo.kl_budget": 3.0})
    section = distance.build_distance_section(load(tmp_path, [*plain({"sft": [0.0] * 8}), *budgets, lost, alone]))
    found = rows(table(section, "At the same KL budget, by ppo.kl_budget"))
    assert found["mpo ppo.kl_budget=2.0"][1:3] == ["2", "1.90"]
    assert found["mpo ppo.kl_budget=2.0"][4].startswith("0.50 [0.50, 0.50] (p ")
    assert found["ppo ppo.kl_budget=2.0"][4] == ""
    assert found["mpo-sft-kl ppo.kl_budget=2.0"][2:] == ["failed", "failed", ""]
    assert found["mpo ppo.kl_budget=3.0"][4] == ""  # PPO has no such budget


def path(*points: tuple[float, float, float]) -> list[Columns]:
    return [around(reward, kl=kl, true_reward=true) for reward, kl, true in points]


def test_over_optimisation_by_hand(tmp_path: Path) -> None:
    points = [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.5, 3.0, 0.6)]
    *way, end = path(*points)
    arms = [Arm("sft", {0: way[0]}), Arm("ppo", {0: end}, trace={0: way})]
    section = overoptimisation.build_overoptimisation_section(load(tmp_path, arms))
    assert [row[:3] for row in table(section, "Along training").rows] == [
        ["ppo", "start", "0"],
        ["ppo", "snapshot 1", "20"],  # after 2 of 4 iterations of 10 completions
        ["ppo", "end", "40"],
    ]
    assert section.opening == (
        "0 of the 1 arms and seeds with a higher mean reward than SFT have a lower true r* than SFT. During PPO of ppo "
        "the reward changes by 1.50 [1.50, 1.50] and true r* by 0.60 [0.60, 0.60]; from the last snapshot to the end "
        "by 0.50 [0.50, 0.50] and −0.40 [−0.40, −0.40]: the reward rises significantly while true r* falls (95% "
        "intervals over 8 prompts at one seed; other seeds may differ)."
    )
    (_, *origin), (name, *gains) = figure_rows(section, "gains")
    assert origin == [0.0, None, None] * 2  # SFT against itself
    assert name == "ppo"
    assert np.allclose(gains, [1.5] * 3 + [0.6] * 3, atol=0.01)
    drawn = [row[2::3] for row in figure_rows(section, "over-optimisation")]
    assert np.allclose(drawn, [(kl, r) for r, kl, _ in points] + [(kl, true) for _, kl, true in points])


def test_seeds_that_rise_in_reward_and_fall_in_truth_are_named(tmp_path: Path) -> None:
    done = [
        Arm("sft", {seed: around(0.0, true_reward=0.0) for seed in (0, 1)}),
        Arm("ppo", {0: around(1.0, true_reward=1.0), 1: around(2.0, kl=6.0, true_reward=-0.5)}),
        Arm("mpo", {0: around(-1.0, true_reward=-1.0), 1: around(0.5, true_reward=0.5)}),
    ]
    section = overoptimisation.build_overoptimisation_section(load(tmp_path, done))
    (fallen,) = table(section, "More reward, less true r*").rows
    gains = ["2.00 [2.00, 2.00]", "<0.001", "−0.50 [−0.50, −0.50]", "<0.001"]
    assert list(fallen) == ["ppo", "1", *gains, "6.00", "50%"]
    assert section.opening == (
        "1 of the 3 arms and seeds with a higher mean reward than SFT have a lower true r* than SFT, 1 of them "
        "significantly in both."
    )


def test_a_fall_within_the_noise_is_counted_but_not_told(tmp_path: Path) -> None:
    noisy = around(1.0, true_reward=0.0) | {"true_reward": [-0.1 + 2 * noise for noise in NOISE]}
    done = [Arm("sft", {0: around(0.0, true_reward=0.0)}), Arm("ppo", {0: noisy})]
    section = overoptimisation.build_overoptimisation_section(load(tmp_path, done))
    assert section.opening.startswith("1 of the 1 arms and seeds")
    assert section.opening.endswith(", 0 of them significantly in both.")


def describe_ppo(folder: Path, reward: Sequence[float], true: Sequence[float]) -> str:
    """What is said of a PPO whose reward and r* change by so much from its last snapshot to its end, seed by seed."""
    ends = dict(enumerate(path(*((1.0 + one, 3.0, 1.0 + other) for one, other in zip(reward, true, strict=True)))))
    ppo = Arm("ppo", ends, trace=dict.fromkeys(ends, path((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))
    return overoptimisation.build_overoptimisation_section(load(folder, [ppo])).opening


@pytest.mark.parametrize(
    ("rises", "falls", "told"),
    [
        ([1.0], [-1.0], True),
        ([1.0], [0.0], False),
        ([1.0, 1.01], [-1.0, -1.01], True),
        ([1.0, 1.5], [-1.0, -1.5], False),  # half its mean apart: two seeds do not tell it
        ([1.0, 1.5, 1.0, 1.5], [-1.0, -1.5, -1.0, -1.5], True),  # four do
        ([1.0, 1.5, 1.0, 1.5, 1.25], [-1.0, -1.5, -1.0, -1.5, -1.25], True),
        ([0.1, 1.5, 0.1, -0.3, 1.25], [-1.0, -1.5, -1.0, -1.5, -1.25], False),
    ],
)
def test_hacking_is_told_by_what_the_seeds_hold(
    tmp_path: Path, rises: list[float], falls: list[float], told: bool
) -> None:
    opening = describe_ppo(tmp_path, rises, falls)
    assert ("the reward rises significantly while true r* falls" in opening) == told
    both = describe_ppo(tmp_path / "both", rises, [-fall for fall in falls])
    assert ("both still rise significantly" in both) == told


def test_without_a_yardstick_there_is_no_over_optimisation(tmp_path: Path) -> None:
    results = load(tmp_path, plain({"sft": SFT_SCORES, "ppo": SFT_SCORES}))
    assert overoptimisation.build_overoptimisation_section(results) is None


def test_gains_of_two_runs_are_over_their_own_sft(tmp_path: Path) -> None:
    folders = []
    for name, base in (("a", 0.0), ("b", 5.0)):
        arms = [Arm("sft", {0: around(base, true_reward=0.0)}), Arm("ppo", {0: around(7.0, true_reward=0.5)})]
        folders.append(Writer(tmp_path / name, name=name, cache=f"{name}-cache").run(arms))
    drawn = figure_rows(overoptimisation.build_overoptimisation_section(load_runs(*folders)), "gains")
    gains = {"a: sft": 0.0, "a: ppo": 7.0, "b: sft": 0.0, "b: ppo": 2.0}
    assert {row[0]: row[1] for row in drawn} == pytest.approx(gains)


def test_a_trace_is_of_the_seeds_that_have_all_points(tmp_path: Path) -> None:
    *way, end = path((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.5, 3.0, 0.6))
    arm = Arm("ppo", {0: end, 1: around(100.0, true_reward=1.0)}, trace={0: way}, reason="along its training: lost")
    results = load(tmp_path, [arm])
    (found,) = load_ppo_traces(results)
    assert (found.seeds, found.evaluations_per_seed, found.completions_sampled.tolist()) == ([0], 3, [0.0, 20.0, 40.0])
    assert found.estimate_mean_at("score", 2).mean == pytest.approx(1.5)
    section = overoptimisation.build_overoptimisation_section(results)
    assert "During PPO of ppo (1 of 2 seeds)" in section.opening


@pytest.mark.parametrize(
    ("mpo", "sign", "said"),
    [
        ([0.5, 1.0, 2.0], 1, "reaches it after 30 [30, 30], or 38 with"),
        ([1.6, 1.0, 2.0], 1, "reaches it after 0 [0, 0], or 8 with"),
        ([0.5, 1.0, 1.4], 1, "does not reach it within its 40 completions and"),
        ([0.5, 1.0, 1.6], -1, "reaches it after 37, or 45 with"),  # by the means: 20 + 20 * 0.5 / 0.6
    ],
)
def test_samples_needed_by_hand(tmp_path: Path, mpo: list[float], sign: int, said: str) -> None:
    """MPO is at these rewards after 0, 20, 40 completions, PPO ends at 1.5. MPO's pairs are 4 of two completions."""
    *way, end = path(*((reward, 1.0, 0.0) for reward in mpo))
    ppo = scores([1.5 + sign * noise for noise in NOISE], true_reward=NOISE)
    arms = [Arm("mpo", {0: end}, trace={0: way}), Arm("ppo", {0: ppo}, trace={0: way})]
    opening = cost.build_cost_section(load(tmp_path, arms)).opening
    unclear = " (by the means; it is nowhere significantly above that reward)" if sign < 0 else ""
    said = said.replace(" it ", " the final reward of ppo ")
    assert opening.endswith(f". ppo samples 40 completions; mpo's PPO {said} the 8 sampled for its pairs{unclear}.")


@pytest.mark.parametrize("seeds", [1, 3])
def test_bounds_of_the_samples_are_where_the_difference_is_told(seeds: int) -> None:
    """Straight lines: at x the difference is x / 10 - 3 with the same noise everywhere, told within its half width."""
    noise = 0.5 * np.random.default_rng(2).normal(size=(seeds, 50))
    noise -= noise.mean()
    ahead = np.array([-3.0, -1.0, 3.0])[:, None, None] + noise
    found = cost.estimate_zero_crossing(np.array([0.0, 20.0, 60.0]), ahead)
    half = compute_crossed_mean_interval(noise).high
    assert (found.mean, found.low, found.high) == pytest.approx((30.0, 30 - 10 * half, 30 + 10 * half))


def test_samples_needed_is_of_common_seeds(tmp_path: Path) -> None:
    *way, end = path((0.5, 1.0, 0.0), (1.0, 1.0, 0.0), (2.0, 1.0, 0.0))
    arms = [
        Arm("mpo", {0: end, 1: end}, trace={0: way, 1: way}),
        Arm("ppo", {1: around(1.5, true_reward=0.0)}, failed={0: "lost"}, trace={1: way}),
    ]
    section = cost.build_cost_section(load(tmp_path, arms))
    assert "ppo samples 40 completions (1 of 2 seeds); mpo's PPO reaches" in section.opening
    assert "or 38 with the 8 sampled for its pairs" in section.opening


@pytest.mark.parametrize(
    ("arm", "needed"),
    [
        ("sft", "Data SFT"),
        ("best-of-n", "Data SFT RewardModel"),
        ("dpo-base", "Data SFT DPO"),
        ("dpo", "Data SFT RewardModel Samples DPO"),
        ("ppo", "Data SFT RewardModel PPO"),
        ("ppo-hard", "Data SFT RewardModel Samples Selection PPO"),
        ("mpo", "Data SFT RewardModel Samples Selection DPO PPO"),
    ],
)
def test_what_an_arm_needs(tmp_path: Path, arm: str, needed: str) -> None:
    """Neither its evaluation and what only that reads, nor sampled pairs of which it takes the prompts."""
    written = ArmResult(**Writer(tmp_path / "run", second=True).arm(Arm(arm, {0: around(1.0)}), 0))
    assert [key.partition("-")[0] for key in cost.list_charged_stages(written)] == needed.split()
    assert not any("second" in key for key in cost.list_charged_stages(written))


def costs(folder: Path) -> tuple[Section, dict[str, Sequence[str]]]:
    arms = [Arm(name, {0: around(n), 1: around(n + 1)}) for n, name in enumerate(("sft", "ppo", "mpo"))]
    arms[1] = Arm("ppo", {1: around(2.0)}, failed={0: "lost"})
    section = cost.build_cost_section(load(folder, [*arms, Arm("dpo", failed={0: "lost", 1: "lost"})]))
    return section, rows(table(section, "By arm"))


def test_costs_by_hand(tmp_path: Path) -> None:
    section, found = costs(tmp_path)
    assert list(found["sft"][1:6]) == ["11.0", "0", "1,000", "1.00e+09", "50"]
    ppo = found["ppo (failed at 1 of 2 seeds)"]
    assert list(ppo[1:5]) == ["131.0", "6,000", "10,000", "1.10e+10"]
    assert list(found["mpo"][1:5]) == ["167.0", "6,540", "13,000", "1.80e+10"]
    assert "mpo, with all its stages, needs 1.64 times the FLOPs of ppo" in section.opening
    assert "samples 6,540 tokens instead of 6,000" in section.opening
    assert found["dpo"][1] == "failed"
    assert table(section, "By arm").headings[6:] == ["gain in reward over SFT per 1e+10 FLOPs"]
    assert ppo[6:] == ["1.00 [1.00, 1.00]"]  # at seed 1 alone: 2 - 1 over SFT for 1e10 FLOPs more
    assert found["mpo"][6].startswith("1.18 [")  # 2 for 1.7e10
    assert found["sft"][6:] == [""]


def test_a_ratio_of_costs_is_of_common_seeds_with_its_range() -> None:
    mpo = {0: {"flops": 3.0}, 1: {"flops": 5.0}}
    ratio = cost._format_flops_ratio(mpo, {0: {"flops": 2.0}, 1: {"flops": 5.0}})
    assert ratio == "1.14 (1.00 to 1.50 over the seeds) times"
    assert cost._format_flops_ratio(mpo, {0: {"flops": 2.0}}) == "1.50 times"
    assert cost._format_flops_ratio(mpo, {2: {"flops": 2.0}}) == "(at no common seed)"


def test_costs_by_stage_and_all_time(tmp_path: Path) -> None:
    section, _ = costs(tmp_path)
    found = rows(table(section, "By stage"))
    assert re.fullmatch(r"(sft|mpo|ppo|dpo), (sft|mpo|ppo|dpo) and 2 more", found["SFT-0"][1])
    assert found["SFT-0"][2:6] == ["10.0", "0", "1,000", "1.00e+09"]
    assert "SFT-1" not in found
    assert table(section, "By stage").notes == ["Seed 0 only."]


@pytest.mark.parametrize(("seconds", "said"), [(95.0, "95 s"), (720.0, "12 min"), (8640.0, "2.4 h")])
def test_time_text(seconds: float, said: str) -> None:
    assert cost.format_duration(seconds) == said


@pytest.mark.parametrize(("far", "scale"), [(12.0, ", root scale"), (1.5, "")])
def test_the_plane_shows_roots_where_one_arm_is_far_from_the_others(tmp_path: Path, far: float, scale: str) -> None:
    kls = {"sft": 0.0, "dpo": 1.0, "ppo": 1.2, "mpo": far}
    arms = [Arm(name, {0: scores(SFT_SCORES, kl=kl)}) for name, kl in kls.items()]
    figure = distance.build_distance_section(load(tmp_path, arms)).groups[0].figures[0]
    assert figure.columns[1] == "KL from SFT (nats per completion)"  # the numbers are no roots
    assert re.findall(r">(KL [^<]*)<", figure.svg)[0] == f"KL from SFT (nats per completion){scale}"
