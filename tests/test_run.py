"""The whole: a small embedded world through `mixpo run`, all arms; what is computed again, and what a failure takes."""

import csv
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from command_line import run_mixpo
from mixpo.cli import main as cli
from mixpo.data.errors import InputError
from mixpo.experiments.arms import ARMS
from mixpo.experiments.expressions import list_arm_runs, list_gradient_runs
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.experiments.results import load_runs, read_completions, read_evaluation_summary
from mixpo.experiments.run import run_recipe
from mixpo.experiments.shared_stages import SharedStages
from mixpo.experiments.workers import StageDisplay
from mixpo.stages.stage import Snapshot
from mixpo.stages.stage_cache import sort_topologically
from recording_display import RecordingDisplay

SMALL = [
    "arms=[sft,best-of-n,dpo-base,dpo,ppo,mpo]",
    "sweep={arms: [ppo], ppo.kl_coef: [0.03]}",
    "trace={arms: [mpo], snapshots: 1}",
    "gradients.pairs=4",
    "best_of=4",
    "data.train_rows=768",
    "data.test_rows=64",
    "data.demonstration_rows=1024",
    "samples.prompts=96",
    "selection.threshold=null",
    "selection.easy_fraction=0.5",
    "ppo.batch_size=16",
    "ppo.epochs=4",
    "dpo.epochs=3",
    "evaluation.prompts=64",
    "max_completion_tokens=40",
    "runtime.threads=1",
]


def list_places(home: Path) -> list[str]:
    return [f"cache={home / 'cache'}", f"out={home / 'run'}"]


def recipe(home: Path, *overrides: str) -> Recipe:
    return read_recipe("world", [*SMALL, *list_places(home), *overrides])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mixpo", "run", "--quiet", *SMALL, *list_places(home)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return home


@pytest.fixture
def copied_cache(home: Path, tmp_path: Path) -> Path:
    """A folder whose cache holds the stages of the finished run."""
    shutil.copytree(home / "cache", tmp_path / "cache", symlinks=True)
    return tmp_path


def test_every_arm_is_done_and_evaluated(home: Path) -> None:
    results = load_runs(home / "run")
    assert results.arm_names == ["sft", "best-of-n", "dpo-base", "dpo", "ppo", "mpo", "ppo ppo.kl_coef=0.03"]
    for arm in results.arms:
        assert arm.status == "done"
        assert len(read_completions(arm)) == 64
        assert {"score", "true_reward", "kl_from_sft", "tokens", "ended"} <= read_evaluation_summary(arm).keys()
        assert (arm.model is None) == (arm.arm == "best-of-n")
    (mpo,) = results.list_arm_results("mpo")
    assert len(mpo.trace) == 2
    assert [(one.arm, one.part) for one in results.runs[0].gradients if one.folder] == [
        (arm, part) for arm in ("dpo-easy", "dpo-hard", "dpo") for part in ("easy", "hard")
    ]
    page = (home / "run" / "report.html").read_text()
    assert all(f">{arm.name}<" in page for arm in results.arms)
    names = ["results", "reward-model", "selection", "distance", "over-optimisation", "cost", "theorem", "training"]
    assert all(f'<section id="{name}"' in page for name in names)


def test_dpo_ppo_and_mpo_score_above_sft(home: Path) -> None:
    score = {arm.name: read_evaluation_summary(arm)["score"]["mean"] for arm in load_runs(home / "run").arms}
    assert min(score["dpo"], score["ppo"], score["mpo"]) > score["sft"]


def test_the_aligned_model_loads_without_us(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home / "run" / "models" / "mpo-0"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Any advice on chess?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_the_written_recipe_is_the_same_recipe(home: Path) -> None:
    """Seeds that were not set stay unset, so that `seeds=` still works on it."""
    again = read_recipe(str(home / "run" / "recipe.yaml"), ["seeds=[0,1]"])
    given = recipe(home, "seeds=[0,1]")
    assert again == given
    stages = [SharedStages(again, seed).sft for seed in again.seeds]
    assert [stage.seed for stage in stages] == [0, 1]
    assert stages == [SharedStages(given, seed).sft for seed in given.seeds]


def test_a_run_whose_stages_were_deleted_is_named(home: Path, tmp_path: Path) -> None:
    content = json.loads((home / "run" / "results.json").read_text())
    content["arms"][0]["stages"]["SFT-0"] = str(tmp_path / "gone")
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="gone: found no finished stage there"):
        load_runs(tmp_path)


def read_output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what `mixpo WORDS` prints."""
    result = run_mixpo(capsys, *words)
    assert result.code == 0
    return result.out


def test_report_in_every_form(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(home / "run")
    results = load_runs(home / "run")
    expected = {arm.name: read_evaluation_summary(arm)["score"]["mean"] for arm in results.arms}
    rows = list(csv.DictReader(io.StringIO(read_output(capsys, "report", folder, "--format", "csv"))))
    assert {row["arm"]: float(row["score"]) for row in rows if row["seed"] == "all"} == pytest.approx(expected)
    content = json.loads(read_output(capsys, "report", folder, "--format", "json"))
    assert {row["arm"]: row["score"] for row in content["arms"] if row["seed"] == 0} == pytest.approx(expected)
    assert "| mpo | " in read_output(capsys, "report", folder, "--format", "md")
    read_output(capsys, "report", folder, "--out", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == (home / "run" / "report.html").read_text()


def test_compare_prints_runs_side_by_side(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "again", symlinks=True)
    printed = read_output(capsys, "compare", str(home / "run"), str(tmp_path / "again"))
    assert printed.count("mpo") == 2
    assert "again" in printed


def test_a_second_run_computes_nothing(home: Path) -> None:
    result = run_recipe(recipe(home), RecordingDisplay())
    assert result.computed == 0
    assert result.found > 10


def test_a_changed_kl_coef_computes_ppo_arms_and_their_evaluation_again(copied_cache: Path) -> None:
    display = RecordingDisplay()
    run_recipe(recipe(copied_cache, "ppo.kl_coef=0.3", "ppo.epochs=1"), display)
    assert sorted(display.started) == [
        "Evaluation for mpo",
        "Evaluation for mpo",
        "Evaluation for ppo",
        "Evaluation for ppo ppo.kl_coef=0.03",
        "PPO for mpo",
        "PPO for ppo",
        "PPO for ppo ppo.kl_coef=0.03",
    ]


def test_a_stage_that_diverges_takes_only_its_arms_along(copied_cache: Path) -> None:
    display = RecordingDisplay()
    result = run_recipe(recipe(copied_cache, "ppo.max_kl=1e-6", "ppo.epochs=1"), display)
    failed = {arm.name for arm in result.arms if arm.status == "failed"}
    assert failed == {"ppo", "mpo", "ppo ppo.kl_coef=0.03"}
    assert {arm.name for arm in result.arms} - failed == {"sft", "best-of-n", "dpo-base", "dpo"}
    assert all(one.folder for one in result.gradients)
    assert ["ran away" in failure.reason for failure in display.failures] == [True] * 3
    written = json.loads((copied_cache / "run" / "results.json").read_text())
    assert "ran away" in next(arm["reason"] for arm in written["arms"] if arm["arm"] == "mpo")


def test_a_run_of_which_nothing_is_left_says_why(copied_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["arms=[ppo]", "sweep=null", "trace.arms=[]", "gradients.pairs=0"]
    models = copied_cache / "run" / "models"
    run_recipe(recipe(copied_cache, *words), RecordingDisplay())
    assert [link.name for link in models.iterdir()] == ["ppo-0"]
    result = run_mixpo(capsys, "run", "--quiet", *SMALL, *words, "ppo.max_kl=1e-6", *list_places(copied_cache))
    assert result.code == 1
    assert "ppo failed at seed 0" in result.out
    assert "ran away" in result.out
    assert not list(models.iterdir()), "the model of the earlier recipe is not this run's"


def expand_names(*overrides: str) -> list[str]:
    return [run.name for run in list_arm_runs(read_recipe("world", list(overrides)))]


def test_a_sweep_is_every_combination_at_which_an_arm_differs() -> None:
    names = expand_names("arms=[sft,ppo,mpo]", "sweep={selection.threshold: [1.0, 2.0], ppo.kl_coef: [0.05, 0.1]}")
    assert names == [
        "sft",
        "ppo",
        "mpo",
        "ppo ppo.kl_coef=0.05",
        "mpo selection.threshold=1.0 ppo.kl_coef=0.05",
        "mpo selection.threshold=1.0",
        "mpo ppo.kl_coef=0.05",
    ]


def test_sweeps_of_some_arms_and_nested_keys() -> None:
    sweep = "sweep=[{arms: [mpo], selection: {threshold: [1]}}, {label_noise.share: [0.2]}]"
    swept = ["mpo selection.threshold=1", "ppo label_noise.share=0.2", "mpo label_noise.share=0.2"]
    assert expand_names("arms=[ppo,mpo]", sweep) == ["ppo", "mpo", *swept]


def test_what_does_not_depend_on_a_swept_setting_is_one_stage() -> None:
    overrides = ["arms=[sft,dpo-base,ppo,mpo]", "sweep={selection.threshold: [0.5, 1.0], ppo.kl_coef: [0.05, 0.4]}"]
    runs = list_arm_runs(read_recipe("world", overrides))
    stages = {stage for run in runs for stage in sort_topologically(run.evaluation)}
    counted = Counter(type(stage).__name__ for stage in stages)
    assert counted == {
        **dict.fromkeys(("Pretrained", "Data", "SFT", "RewardModel", "Samples"), 1),
        "Selection": 3,
        "DPO": 1 + 3,
        "PPO": 3 + 1 + 2 * 2,
        "Evaluation": 2 + 3 + 1 + 2 * 2,
    }


def test_label_noise_reaches_what_learns_from_labels_but_not_sft_nor_what_scores() -> None:
    r = SharedStages(read_recipe("world", ["label_noise.share=0.2"]), 0)
    clean = SharedStages(read_recipe("world"), 0)
    assert r.sft == clean.sft
    assert r.clean_reward == clean.reward != r.reward
    assert r.samples != clean.samples
    assert r.build_evaluation(r.sft) == clean.build_evaluation(clean.sft)
    assert ARMS["dpo-base"](r).pairs != clean.data.train_pairs
    best, best_clean = ARMS["best-of-n"](r), ARMS["best-of-n"](clean)
    assert (best.chooser, best.reward, best_clean.chooser) == (r.reward, r.clean_reward, None)


def test_the_second_reward_model_reads_other_pairs_and_only_evaluations_read_it() -> None:
    r = SharedStages(read_recipe("world", ["data.second_rows=64"]), 0)
    assert r.second_reward is not None
    assert (r.second_reward.pairs, r.reward.pairs) == (r.data.second_pairs, r.data.train_pairs)
    mpo = ARMS["mpo"](r)
    assert r.second_reward not in set(sort_topologically(mpo))
    grouped = [ARMS["mpo-rloo"](SharedStages(read_recipe("world", words), 0)) for words in ([], ["ppo.gae_lambda=0.5"])]
    assert grouped[0] == grouped[1]
    assert r.build_evaluation(mpo).second == r.second_reward


def test_traced_arms_are_evaluated_from_their_start_on() -> None:
    runs = list_arm_runs(read_recipe("world", ["arms=[ppo,mpo,dpo]", "trace={arms: [mpo], snapshots: 2}"]))
    by_name = {run.name: run for run in runs}
    mpo = by_name["mpo"].evaluation.policy
    assert mpo.snapshots == 2
    snapshots = [Snapshot(stage=mpo, number=number) for number in (1, 2)]
    assert [one.policy for one in by_name["mpo"].trace] == [mpo.policy, *snapshots]
    assert by_name["ppo"].trace == ()
    assert by_name["ppo"].evaluation.policy.snapshots == 0
    with pytest.raises(InputError, match=r"trace.arms: found 'dpo', which ends with DPO; expected one with PPO"):
        list_arm_runs(read_recipe("world", ["arms=[dpo]", "trace.arms=[dpo]"]))
    with pytest.raises(InputError, match=r"trace.arms: found 'ppo', which is not among the arms"):
        list_arm_runs(read_recipe("world", ["arms=[dpo]", "trace.arms=[ppo]"]))


def test_gradients_are_measured_on_both_parts_of_each_dpo_model() -> None:
    assert list_gradient_runs(read_recipe("world")) == []
    runs = list_gradient_runs(read_recipe("world", ["gradients.pairs=8", "seeds=[3]"]))
    r = SharedStages(read_recipe("world"), 3)
    assert [(run.arm, run.part, run.seed) for run in runs] == [
        (arm, part, 3) for arm in ("dpo-easy", "dpo-hard", "dpo") for part in ("easy", "hard")
    ]
    assert runs[0].stage.policy == ARMS["dpo-easy"](r)
    assert (runs[1].stage.pairs, runs[1].stage.count) == (r.selection.hard_pairs, 8)


def test_a_recipe_on_top_of_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: world\nname: mine\nppo: {kl_coef: 0.3}\narms: [sft]\n")
    (tmp_path / "again.yaml").write_text(f"base: {tmp_path / 'mine.yaml'}\nname: again\n")
    mine, world = read_recipe(str(tmp_path / "again.yaml")), read_recipe("world")
    assert (mine.name, mine.arms, mine.ppo.kl_coef) == ("again", ("sft",), 0.3)
    assert mine.ppo.batch_size == world.ppo.batch_size
    assert mine.sft == world.sft
    (tmp_path / "open.yaml").write_text("base: world\nname: open\ndata:\n  train_rows: ???\n")
    with pytest.raises(InputError, match=r"open\.yaml: data\.train_rows: not given"):
        read_recipe(str(tmp_path / "open.yaml"))
    (tmp_path / "loop.yaml").write_text(f"base: {tmp_path / 'loop.yaml'}\nname: loop\n")
    with pytest.raises(InputError, match="found a cycle of bases"):
        read_recipe(str(tmp_path / "loop.yaml"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sweep={ppo.kl_coeff: [0.1]}", "sweep: ppo.kl_coeff: unknown key; did you mean kl_coef?"),
        ("sweep={kl_coef: [0.1]}", "sweep: found key 'kl_coef'; expected a key of a section that arms are"),
        ("sweep={ppo.kl_coef: [much]}", "sweep: ppo.kl_coef: found 'much'; expected a valid number"),
        ("sweep=[{arms: [mpoo], ppo.kl_coef: [0.1]}]", "sweep.arms: found 'mpoo'; did you mean mpo?"),
        ("trace.arms=[mpoo]", "trace.arms: found 'mpoo'; did you mean mpo?"),
        ("sweep={seeds: [1]}", "sweep: found key 'seeds'; expected a key of a section"),
        ("sweep={runtime.threads: [1]}", "sweep: found key 'runtime.threads'; expected a key of a section that arms"),
        ("sweep={ppo.kl_coef.x: [1]}", "sweep: ppo.kl_coef: found {'x': 1}; expected a valid number"),
    ],
)
def test_bad_sweeps_are_named(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        list_arm_runs(read_recipe("world", [override]))


def test_no_sweep_at_all(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: world\nname: mine\narms: [ppo]\nsweep: {ppo.kl_coef: [0.3]}\n")
    swept = read_recipe(str(tmp_path / "mine.yaml"))
    assert [run.name for run in list_arm_runs(swept)] == ["ppo", "ppo ppo.kl_coef=0.3"]
    assert read_recipe(str(tmp_path / "mine.yaml"), ["sweep=null"]).sweep == ()


def test_sweeping_a_preset_takes_its_constants_along() -> None:
    recipe = read_recipe("world", ["ppo={preset: deepspeed-chat, clip: 0.3, seed: 0}"])
    assert (recipe.ppo.epochs_per_batch, recipe.ppo.value_init, recipe.ppo.decay) == (1, "reward", "cosine")
    back = recipe.with_changes({"ppo.preset": "mixpo"})
    assert back.ppo == read_recipe("world", ["ppo={preset: mixpo, clip: 0.3, seed: 0}"]).ppo
    assert back.ppo.whiten_advantages != recipe.ppo.whiten_advantages


def test_sweeping_a_key_below_a_section_that_is_not_there() -> None:
    (run,) = list_arm_runs(read_recipe("world", ["arms=[ppo]"]).with_changes({"ppo.lora.rank": 4}))
    assert run.evaluation.policy.lora.rank == 4


def test_swept_settings_that_are_valid_only_together() -> None:
    names = expand_names("arms=[mpo]", "sweep={selection.threshold: [null], selection.easy_fraction: [0.3]}")
    assert names == ["mpo", "mpo selection.threshold=None selection.easy_fraction=0.3"]


class StoppingDisplay(RecordingDisplay):
    """A display whose user stops the run as its first stage begins."""

    def start_stage(self, stage: str, identity: str, arms: Sequence[str]) -> StageDisplay:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "is_said"),
    [
        (["runtime.sharded=true"], True),
        (["runtime.sharded=true", "runtime.processes=2"], False),
        (["runtime.sharded=true", "infra={cluster: local}"], True),
        (["runtime.sharded=true", "infra={cluster: local, tasks_per_node: 2}"], False),
        ([], False),
    ],
)
def test_that_one_process_cuts_no_weights_is_said_first(tmp_path: Path, words: list[str], is_said: bool) -> None:
    display = StoppingDisplay()
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, *words), display)
    assert len(display.notes) == is_said
    assert all(note.startswith("runtime.sharded: every stage has one process") for note in display.notes)
