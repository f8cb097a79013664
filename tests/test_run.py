"""The whole: a small embedded world through `mixpo run`, all arms; what is computed again, and what a failure takes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from mixpo.cli import main as cli
from mixpo.data.errors import InputError
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.experiments.run import run
from mixpo.experiments.setup import Setup
from mixpo.report.results import completions, evaluation, load

SMALL = [
    "arms=[sft,dpo-base,dpo,ppo,mpo]",
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
]


class Recorder:
    """A display that remembers what was computed."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.notes: list[str] = []

    def begin(self, stage: str, identity: str, arms: str) -> None:
        self.begun.append(f"{stage} for {arms}")

    def step(self, done: int, total: int, metrics: object) -> None:
        assert 0 < done <= total

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, seconds: float) -> None:
        pass


def recipe(home: Path, *overrides: str) -> Recipe:
    return read_recipe("world", [*SMALL, f"cache={home / 'cache'}", f"out={home / 'run'}", *overrides])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        words = [*SMALL, f"cache={home / 'cache'}", f"out={home / 'run'}"]
        patch.setattr(sys, "argv", ["mixpo", "run", "--quiet", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return home


def test_every_arm_is_done_and_evaluated(home: Path) -> None:
    results = load(home / "run")
    assert [arm.arm for arm in results.arms] == ["sft", "dpo-base", "dpo", "ppo", "mpo"]
    for arm in results.arms:
        assert arm.status == "done"
        assert len(completions(arm)) == 64
        assert {"score", "true_reward", "kl_from_sft", "tokens", "ended"} <= evaluation(arm).keys()
    page = (home / "run" / "report.html").read_text()
    assert all(f">{arm.arm}<" in page for arm in results.arms)


def test_dpo_ppo_and_mpo_score_above_sft(home: Path) -> None:
    score = {arm.arm: evaluation(arm)["score"]["mean"] for arm in load(home / "run").arms}
    assert min(score["dpo"], score["ppo"], score["mpo"]) > score["sft"]


def test_mpo_is_ppo_on_hard_prompts_from_and_anchored_to_dpo_on_easy_pairs(home: Path) -> None:
    import yaml

    mpo = next(arm for arm in load(home / "run").arms if arm.arm == "mpo")
    folder = next(folder for key, folder in mpo.stages.items() if key.startswith("PPO-"))
    stage = yaml.safe_load((Path(folder) / "config.yaml").read_text())["stage"]
    assert stage["policy"] == stage["reference"]
    assert (stage["policy"]["type"], stage["policy"]["pairs"]["of"]) == ("DPO", "easy")
    assert (stage["prompts"]["of"], stage["reward"]["type"]) == ("hard", "RewardModel")
    assert stage["policy"]["policy"]["type"] == stage["policy"]["reference"]["type"] == "SFT"


def test_the_aligned_model_loads_without_us(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home / "run" / "models" / "mpo-0"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "Any advice on chess?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_the_written_recipe_is_the_same_recipe(home: Path) -> None:
    """Seeds that were not set stay unset, so that `seeds=` still works on it."""
    again = read_recipe(str(home / "run" / "recipe.yaml"), ["seeds=[0,1]"])
    given = recipe(home, "seeds=[0,1]")
    assert again == given
    assert [Setup(again, seed).sft.seed for seed in again.seeds] == [0, 1]
    assert [Setup(again, seed).sft for seed in again.seeds] == [Setup(given, seed).sft for seed in given.seeds]


def test_a_run_whose_stages_were_deleted_is_named(home: Path, tmp_path: Path) -> None:
    content = json.loads((home / "run" / "results.json").read_text())
    content["arms"][0]["stages"]["SFT-0"] = str(tmp_path / "gone")
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="gone: found no finished stage there"):
        load(tmp_path)


def test_a_second_run_computes_nothing(home: Path) -> None:
    result = run(recipe(home), Recorder())
    assert result.computed == 0
    assert result.found > 10


def test_a_changed_kl_coef_computes_ppo_arms_and_their_evaluation_again(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "cache", tmp_path / "cache", symlinks=True)
    recorder = Recorder()
    run(recipe(tmp_path, "ppo.kl_coef=0.3", "ppo.epochs=1"), recorder)
    assert sorted(recorder.begun) == [
        "Evaluation for mpo",
        "Evaluation for ppo",
        "PPO for mpo",
        "PPO for ppo",
    ]


def test_a_stage_that_diverges_takes_only_its_arms_along(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "cache", tmp_path / "cache", symlinks=True)
    recorder = Recorder()
    result = run(recipe(tmp_path, "ppo.max_kl=1e-6", "ppo.epochs=1"), recorder)
    status = {arm.arm: arm.status for arm in result.arms}
    assert status == {"sft": "done", "dpo-base": "done", "dpo": "done", "ppo": "failed", "mpo": "failed"}
    assert any("ran away" in note for note in recorder.notes)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "ran away" in next(arm["reason"] for arm in written["arms"] if arm["arm"] == "mpo")
