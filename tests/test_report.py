"""The report as a whole, of run folders that are written by hand: what is shown, in every form; what is refused."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixpo.data.errors import InputError
from mixpo.experiments.results import Results, load_runs
from mixpo.report.arms import build_main_table
from mixpo.report.page import build_document, render_report, tabulate_means, write_html_report
from mixpo.report.render import render_html, render_markdown
from report_runs import CLEAR, SFT_SCORES, Arm, Writer, load, plain, rows, scores, shifted

RAN_AWAY = "PPO 1a2b3c4d: the KL ran away: <nan> & more"
FAILED = Arm("dpo-base", failed={0: RAN_AWAY})
VECTORS = {"chosen_chosen": 2.0, "rejected_rejected": 1.0, "chosen_rejected": 0.5}
GRADIENTS = {"log_x_chosen": 0.0, "log_x_rejected": 0.0, "by_chosen": -0.5, "by_rejected": 0.5, **VECTORS}


def world(columns: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    return {**columns, "true_reward": shifted([0.5] * 6, list(columns["score"]))}


def everything(folder: Path) -> Results:
    """A run that has every section."""
    arms = [Arm(arm.name, {0: world(arm.done[0])}) for arm in plain(CLEAR)]
    for arm, values in {"dpo": 0.4, "dpo-easy": 0.5, "dpo-hard": 0.2}.items():
        arms.append(Arm(arm, {0: world(scores(shifted([values] * 6)))}))
    arms[1].trace = {0: [world(scores(SFT_SCORES)), world(scores(shifted([0.5] * 6)))]}
    arms += [
        Arm("ppo", {0: world(scores(shifted([0.1] * 6), kl=0.5))}, changes={"ppo.kl_coef": 0.2}),
        Arm("ppo", {0: world(scores(SFT_SCORES))}, changes={"label_noise.share": 0.3}),
        FAILED,
    ]
    writer = Writer(folder / "run", world=True)
    gradients = [writer.gradients("dpo", part, 0, [GRADIENTS, GRADIENTS]) for part in ("easy", "hard")]
    return writer.load(arms, gradients)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return everything(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def page(whole: Results) -> str:
    path = write_html_report(whole, whole.runs[0].folder)
    assert path == whole.runs[0].folder / "report.html"
    return path.read_text(encoding="utf8")


def test_page_has_every_section_in_order(whole: Results, page: str) -> None:
    names = re.findall(r'<section id="([^"]*)">', page)
    assert names == [
        *("results", "reward-model", "selection", "distance", "over-optimisation", "cost", "subsets", "noise"),
        *("theorem", "training", "completions", "failed", "reproduce"),
    ]
    assert re.findall(r'<li><a href="#([^"]*)">', page) == names
    assert "9.9.9" in page
    assert "1,280 train pairs, 8 test pairs, 7 demonstrations; 1 bad rows were excluded" in page


def test_page_is_the_same_twice(whole: Results, page: str) -> None:
    assert render_report(load_runs(whole.runs[0].folder), "html") == page


def test_whatever_failed_is_told_with_its_reason(tmp_path: Path) -> None:
    arms = plain(CLEAR, seeds=(0, 1))
    arms[2] = Arm("mpo", {0: arms[2].done[0]}, failed={1: RAN_AWAY})
    arms[1].reason = "along its training: Evaluation 77: disk full"
    writer = Writer(tmp_path / "run")
    lost = writer.gradients("dpo-easy", "hard", 1, "Gradients 88: out of memory")
    results = writer.load([*arms, FAILED], [lost])
    assert list(build_document(results).failures) == [
        ("dpo-base (seed 0)", RAN_AWAY),
        ("mpo (seed 1)", RAN_AWAY),
        ("ppo (seed 0)", "along its training: Evaluation 77: disk full"),
        ("ppo (seed 1)", "along its training: Evaluation 77: disk full"),
        ("gradients of dpo-easy on hard pairs (seed 1)", "Gradients 88: out of memory"),
    ]
    table = build_main_table(results)
    assert rows(table)["dpo-base"][1] == "failed"
    assert rows(table)["mpo (failed at 1 of 2 seeds)"][1].startswith("3.00 [")  # of seed 0 alone
    assert f"dpo-base failed at seed 0: {RAN_AWAY}" in table.notes
    assert f"mpo failed at seed 1: {RAN_AWAY}" in table.notes


ONE = {0: scores([1.0])}
TWICE = {0: [ONE[0], ONE[0]]}
LITTLE = {
    "one arm": [Arm("sft", {0: scores(SFT_SCORES)})],
    "one prompt": [Arm("sft", ONE), Arm("ppo", ONE, trace=TWICE), Arm("mpo", ONE, trace=TWICE)],
    "one prompt of two seeds": [Arm(name, {seed: scores([seed]) for seed in (0, 1)}) for name in ("sft", "ppo", "mpo")],
    "no mpo": plain({"sft": SFT_SCORES, "dpo-base": SFT_SCORES}),
    "no ppo": plain({"sft": SFT_SCORES, "mpo": SFT_SCORES}),
    "no sft": plain({"mpo": SFT_SCORES, "ppo": SFT_SCORES}),
    "all failed": [FAILED, Arm("mpo", failed={0: "lost", 1: "lost"})],
    "no seed in common": [Arm("mpo", {0: scores([1.0, 2.0])}, {1: "x"}), Arm("ppo", {1: scores([1.0, 2.0])}, {0: "y"})],
    "only a point of a sweep": [
        Arm("mpo", failed={0: "lost"}),
        Arm("mpo", {0: scores(SFT_SCORES)}, changes={"ppo.kl_budget": 2.0}),
    ],
    "sweep of one arm": [
        *plain({"sft": SFT_SCORES, "mpo": SFT_SCORES}),
        Arm("mpo", {0: scores(SFT_SCORES)}, changes={"ppo.kl_coef": 0.0}),
        Arm("mpo", failed={0: "lost"}, changes={"label_noise.share": 0.3}),
    ],
}


def with_second(arm: Arm) -> Arm:
    """The same arm, scored by a second reward model too."""
    done = {seed: {**columns, "second_score": columns["score"]} for seed, columns in arm.done.items()}
    trace = {seed: [{**one, "second_score": one["score"]} for one in many] for seed, many in arm.trace.items()}
    return replace(arm, done=done, trace=trace)


LITTLE |= {f"{case}, scored twice": [with_second(arm) for arm in LITTLE[case]] for case in ("one prompt", "no sft")}


@pytest.mark.parametrize("case", LITTLE)
def test_reports_of_runs_with_little_in_them(tmp_path: Path, case: str) -> None:
    arms = LITTLE[case]
    made = build_document(load(tmp_path, arms, second="twice" in case))
    assert made.sections[0].id == "results"
    assert ("selection" in [part.id for part in made.sections]) == any(arm.name == "mpo" for arm in arms)
    assert len(made.failures) == sum(len(arm.failed) for arm in arms)
    for part in made.sections:
        assert not re.search(r"\bnan\b", part.opening)
        for group in part.groups:
            for row in group.table.rows if group.table else ():
                assert len(row) == len(group.table.headings), part.id
                assert not any(re.search(r"\bnan\b", cell) for cell in row), row
    assert render_html(made, mixpo_version="9.9.9", date="today").endswith("</html>")
    assert render_markdown(made).startswith("# tiny")


def strictly(content: str) -> Any:
    return json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_csv_json_and_markdown_agree_with_the_table(whole: Results) -> None:
    table = rows(build_main_table(whole))
    read = list(csv.DictReader(io.StringIO(render_report(whole, "csv"))))
    content = strictly(render_report(whole, "json"))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in content["arms"]] == read
    for row in read:
        if row["seed"] == "all":
            shown = [f"{float(row[key]):.2f}" for key in ("score", "score_low", "score_high")]
            assert table[row["arm"]][1] == f"{shown[0]} [{shown[1]}, {shown[2]}]"
            assert float(row["score"]) == pytest.approx(
                float(np.mean(whole.get_evaluation_column(row["arm"], "score")))
            )
            assert row["prompts"] == "6"
    assert [row["status"] for row in read if row["arm"] == "dpo-base"] == ["failed"]
    parts = {part["id"]: part for part in content["sections"]}
    assert parts["results"]["groups"][0]["table"]["rows"] == [list(row) for row in table.values()]
    groups = [group for part in content["sections"] for group in part["groups"]]
    assert {tuple(group) for group in groups} == {("title", "figures", "table", "notes")}
    assert {tuple(figure) for group in groups for figure in group["figures"]} == {("name", "columns", "rows")}
    assert content["failed"] == [{"what": "dpo-base (seed 0)", "why": RAN_AWAY}]
    assert content["recipes"]["tiny"]["note"] == "</pre><script>"
    markdown = render_report(whole, "md")
    assert re.search(rf"\| mpo \| {re.escape(table['mpo'][1])} \|", markdown)
    assert "mpo · score 2.00 · r\\* 2.50:" in markdown
    assert all(f"## {part['title']}\n" in markdown for part in content["sections"])
    assert "the KL ran away: <nan> & more" in markdown  # within a fence


def test_numbers_of_a_failed_seed_are_empty(tmp_path: Path) -> None:
    done = {seed: scores(SFT_SCORES) for seed in (0, 2)}
    names, found = tabulate_means(load(tmp_path, [Arm("sft", done, failed={1: "lost"})]))
    read = [dict(zip(names, row, strict=True)) for row in found]
    assert [row["seed"] for row in read] == [0, 2, 1, "all"]
    assert [row["status"] for row in read] == ["done", "done", "failed", "done at 2 of 3 seeds"]
    assert read[2]["score"] is None
    assert read[3]["score"] == 1.0


def test_load_refuses_a_run_twice_and_one_whose_stages_were_deleted(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "run").run(plain(CLEAR))
    with pytest.raises(InputError, match="found this run twice"):
        load_runs(folder, tmp_path / "x" / ".." / "run")
    (tmp_path / "cache" / "PPO-0all" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"PPO-0all: found no finished stage there"):
        load_runs(folder)


ASKED = [[{"role": "user", "content": f"question {number}"}] for number in range(6)]


@pytest.mark.parametrize(
    ("asked", "difference"),
    [
        ([*ASKED[:2], ASKED[0], *ASKED[3:]], "6 test prompts.* has 6, and they differ from prompt 3 on"),
        (ASKED[:4], "4 test prompts.* has 6, and one begins with the other"),
    ],
)
def test_load_refuses_other_test_prompts(tmp_path: Path, asked: list[Any], difference: str) -> None:
    one = Writer(tmp_path / "one", name="a", prompts=ASKED).run(plain(CLEAR))
    fewer = {name: values[: len(asked)] for name, values in CLEAR.items()}
    other = Writer(tmp_path / "other", name="b", cache="others", prompts=asked).run(plain(fewer))
    with pytest.raises(InputError, match=f"other, sft at seed 0: found {difference}"):
        load_runs(one, other)


def test_load_refuses_other_test_prompts_within_a_run(tmp_path: Path) -> None:
    arms = [*plain(CLEAR), Arm("mpo", {0: scores(SFT_SCORES[:5])}, changes={"evaluation.prompts": 5})]
    with pytest.raises(InputError, match=r"mpo evaluation\.prompts=5 at seed 0: found 5 test prompts"):
        load(tmp_path, arms)


def test_completions_are_of_the_seed_at_which_most_arms_finished(tmp_path: Path) -> None:
    arms = plain(CLEAR, seeds=(1,))
    arms[0] = Arm("sft", {seed: scores(SFT_SCORES) for seed in (0, 1)})
    arms[2] = Arm("mpo", {1: arms[2].done[1]}, failed={0: "lost"})
    made = build_document(load(tmp_path, arms))
    assert made.completions_opening == (
        "Completions of 3 arms for the first 6 test prompts, at seed 1. mpo scores higher than ppo on 6 of them and "
        "lower on 0."
    )
    assert [len(asked.completions) for asked in made.prompts] == [3] * 6
    assert made.prompts[1].last_message == "question 1 & <b>more</b>"
    assert [turn["content"] for turn in made.prompts[1].earlier_turns] == ["earlier turn", "a reply"]
    assert {shown.arm: shown.text for shown in made.prompts[1].completions}["mpo"] == "answer 1 of mpo"
    assert made.pair == ("mpo", "ppo")


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    one = Writer(tmp_path / "one", name="a").run(plain(CLEAR, seeds=(0, 1)))
    better = {**CLEAR, "mpo": shifted([3.0] * 6)}
    two = Writer(tmp_path / "two", name="b", cache="others").run([*plain(better), FAILED])
    results = load_runs(one, two)
    assert results.arm_names == ["a: sft", "a: ppo", "a: mpo", "b: sft", "b: ppo", "b: mpo", "b: dpo-base"]
    made = build_document(results)
    assert made.title == "a, b"
    assert made.pair == ("b: mpo", "a: mpo")
    said = "b: mpo has a significantly higher reward than a: mpo (+1.00, 95% CI [0.85, 1.15], p <0.001)"
    assert made.sections[0].opening.count(said) == 1
    assert "at one seed" in made.sections[0].opening
    assert ("b: dpo-base (seed 0)", RAN_AWAY) in made.failures
    assert [name for name, _ in made.recipes] == ["a", "b"]
    render_report(results, "html")


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    one, two, three = (Writer(tmp_path / place).run(plain({"sft": SFT_SCORES})) for place in ("a/x", "a/y", "b/x"))
    assert load_runs(one, two).arm_names == ["x: sft", "y: sft"]
    assert load_runs(one, three).arm_names == [f"{one}: sft", f"{three}: sft"]


def test_rewards_of_other_reward_models_are_not_compared(tmp_path: Path) -> None:
    arms = [Arm(arm.name, {0: world(arm.done[0])}) for arm in plain(CLEAR)]
    one = Writer(tmp_path / "one", name="a", world=True).run(arms)
    two = Writer(tmp_path / "two", name="b", world=True, cache="others", reward="other").run(arms)
    results = load_runs(one, two)
    opening = build_document(results).sections[0].opening
    said = "reward is not compared, because different models gave it; b: mpo minus a: mpo in true r* is +0.00"
    assert said in opening
    assert "highest" not in opening
    table = build_main_table(results)
    against_ppo = table.headings.index("win/tie/lose vs a: ppo")
    assert [rows(table)[name][against_ppo] for name in ("a: mpo", "b: mpo")] == ["100%/0%/0%", ""]
    assert list(table.headings[1:3]) == ["reward (model of a)", "reward (model of b)"]
    assert rows(table)["a: mpo"][2] == rows(table)["b: mpo"][1] == ""
    assert any("whose scales differ" in note for note in table.notes)
    assert build_document(results).completions_opening.endswith("test prompts, at seed 0.")


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "run").run(plain(CLEAR))
    (place,) = (tmp_path / "cache").glob("Evaluation-0mpo/completions.parquet")
    whole = place.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", None):
        place.unlink() if broken is None else place.write_bytes(broken)
        with pytest.raises(InputError, match=r"Evaluation-0mpo/completions.parquet: found no readable rows"):
            build_document(load_runs(folder))
    Writer(tmp_path / "run").run(plain({**CLEAR, "mpo": [0.0, math.nan, 0.0, 0.0, 0.0, 0.0]}))
    with pytest.raises(InputError, match=r"Evaluation-0mpo/completions.parquet: row 2: found score nan"):
        build_document(load_runs(folder))
