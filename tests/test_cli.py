"""The command line on bad input: one clear line, exit code 2, no traceback, nothing lost; and `mixpo plan`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixpo.cli import main as cli
from mixpo.experiments.expressions import expand_arms
from mixpo.experiments.plan import plan_stages
from mixpo.experiments.recipe import read_recipe
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.stage_cache import SETTINGS, StageCache
from mixpo.training.job import SUMMARY
from mixpo.training.record import write_json
from mixpo.training.runtime import Runtime

GOOD = {"prompt": "How?", "chosen": "So.", "rejected": "No."}


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run `mixpo WORDS`, expect exit code 2, return what it printed on standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mixpo", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.kl_coeff=0.1", "world: ppo.kl_coeff: unknown key; did you mean kl_coef?"),
        ("pppo.kl_coef=0.1", "world: pppo: unknown key; did you mean ppo?"),
        ("ppo.lora.rnk=8", "world: ppo.lora.rnk: unknown key; did you mean rank?"),
        ("ppo.kl_coef=much", "world: ppo.kl_coef: found 'much'; expected a valid number"),
        ("ppo.kl_coef=-1", "world: ppo.kl_coef: found -1; expected greater than or equal to 0"),
        ("arms=[sft,mpoo]", "arms: found 'mpoo'; did you mean mpo?"),
        ("selection.easy_fraction=0.5", "selection: found threshold=2.0 and easy_fraction=0.5; expected exactly one"),
        ("ppo.advantage=rloo", "ppo.completions_per_prompt: found 1 with advantage: rloo; expected at least 2"),
        ("data.format=preference", "data.train: found nothing; format 'preference' expects a file"),
        ("data.train=pairs.jsonl", "data.train: found 'pairs.jsonl' beside format 'world', whose rows are generated"),
        (
            "arms=[sft,dpo,dpo]",
            "world: arms: found ['sft', 'dpo', 'dpo']; expected each only once; 'dpo' is repeated",
        ),
        ("seeds=[0,0]", "world: seeds: found [0, 0]; expected each only once; 0 is repeated"),
        ("model.path=./nowhere", "world: model.path: found './nowhere', which does not exist here"),
        ("model.path=package:no_such_package/x.gguf", "no package 'no_such_package' is installed"),
    ],
)
def test_bad_keys_and_values(
    working_folder: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    assert expected in read_error(capsys, "plan", override)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chat here --temperature -1", "mixpo chat: --temperature: found '-1'; expected greater than or equal to 0"),
        ("chat here --temperature inf", "mixpo chat: --temperature: found 'inf'; expected less than or equal to 100"),
        ("chat here --temperature warm", "mixpo chat: --temperature: found 'warm'; expected a valid number"),
        ("chat here --max-tokens 0", "mixpo chat: --max-tokens: found '0'; expected greater than or equal to 1"),
        ("chat", "mixpo chat: Missing argument 'MODEL'; usage: mixpo chat [OPTIONS]"),
        ("plan --ppo.kl_coef=1", "mixpo plan: No such option: --ppo.kl_coef; usage: mixpo plan [OPTIONS]"),
        ("run --quite", "mixpo run: No such option: --quite (Possible options: --quiet); usage: mixpo run [OPTIONS]"),
        ("runn", "mixpo: No such command 'runn'. Did you mean 'run'?; usage: mixpo [OPTIONS] COMMAND"),
        ("report here --format pdf", "mixpo report: --format: found 'pdf'; expected one of 'html', 'md'"),
        ("report here --out", "mixpo: Option '--out' requires an argument"),
        ("judge here --arms a b --model x --concurrency 0", "mixpo judge: --concurrency: found '0'; expected greater"),
        (
            "plan ppo.kl_coef = 0.2",
            "ppo.kl_coef: found neither a recipe file nor a recipe of that name; expected a .yaml",
        ),
        ("data preview ", "'': found neither a recipe file nor a recipe of that name; expected a .yaml file"),
    ],
)
def test_a_hasty_command_line_is_one_line(
    working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixpo", *words.split(" ")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_no_command_at_all_shows_the_help(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 2), (["-h"], 0), (["data"], 2), (["chat", "-h"], 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["mixpo", *words])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        assert (stopped.value.code or 0) == code
        printed = capsys.readouterr()
        assert "Usage: mixpo" in printed.out + printed.err


def test_what_a_recipe_leaves_open_must_be_given(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_error(capsys, "plan", "pairs").splitlines() == [
        "pairs: data.train: not given; expected for example data.train=PATH",
        "pairs: model.path: not given; expected for example model.path=PATH",
    ]


def test_several_problems_at_once(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = read_error(capsys, "run", "ppo.clipp=1", "dpo.beta=0", "sft.epochs=0").splitlines()
    assert len(printed) == 3


def test_recipe_that_is_not_there(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "mine.yaml").write_text("name: mine")
    assert "did you mean mine.yaml?" in read_error(capsys, "run", "mime.yaml")
    assert "expected a .yaml file or one of" in read_error(capsys, "run", "wrld")
    assert "did you mean world?" in read_error(capsys, "run", "wrld")
    (working_folder / "bad.yaml").write_text("a: [")
    assert "bad.yaml: found no readable YAML" in read_error(capsys, "run", "bad.yaml")


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "How?", "chosen": "So."}, "rows.jsonl:2: 'rejected' is missing"),
        ({**GOOD, "chosen": ""}, "rows.jsonl:2: 'chosen' is empty"),
        ({**GOOD, "rejected": "So."}, "rows.jsonl:2: 'rejected' equals 'chosen'"),
        ({**GOOD, "prompt": 3}, "rows.jsonl:2: 'prompt'"),
        ([1], "rows.jsonl:2: the row is a list"),
        ({**GOOD, "prompt": "word " * 200}, "rows.jsonl:2: 'prompt' has"),
    ],
)
def test_bad_rows_end_the_run_before_anything_trains(
    working_folder: Path, capsys: pytest.CaptureFixture[str], row: object, expected: str
) -> None:
    rows = write(working_folder / "rows.jsonl", [GOOD, row])
    printed = read_error(capsys, "run", "--quiet", "data.format=preference", f"data.train={rows}")
    assert expected in printed
    assert "`data.on_bad_row: drop`" in printed
    assert "expected at most 512 together" in read_error(capsys, "select", "-q", "max_completion_tokens=500")
    assert not list(working_folder.glob("runs/cache/sft"))


@pytest.mark.parametrize("command", ["run", "plan", "select"])
def test_every_command_refuses_bad_input(
    working_folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    printed = read_error(capsys, command, "data.format=preference", "data.train=nowhere/rows.jsonl")
    assert "nowhere/rows.jsonl: no such file" in printed


def test_text_and_messages_in_one_file(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(working_folder / "rows.jsonl", [GOOD, {**GOOD, "prompt": [{"role": "user", "content": "How?"}]}])
    printed = read_error(capsys, "run", "-q", "data.format=preference", f"data.train={rows}")
    assert "rows.jsonl:2: 'prompt' is a list, the first row's is not; expected one kind" in printed


def test_a_prompt_that_the_chat_template_refuses(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = [{"role": "user", "content": "How?"}]
    system = [{"role": "system", "content": "Be brief."}]
    rows = write(working_folder / "rows.jsonl", [{**GOOD, "prompt": user}, {**GOOD, "prompt": system + user}])
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "{% for message in messages %}{{ message.content }}{% endfor %}"
    (working_folder / "recipe.yaml").write_text(
        "name: mine\narms: [sft]\nselection: {threshold: 1}\nmax_completion_tokens: 64\n"
        f'model: {{chat_template: "{template}"}}\ndata: {{format: preference, max_prompt_tokens: 64, train: {rows}}}\n'
    )
    printed = read_error(capsys, "run", "-q", "recipe.yaml")
    assert "rows.jsonl:2: 'prompt' is refused by the tokenizer's chat template (no system)" in printed


def test_a_chat_template_that_prints_nothing(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not write an assistant's message" in read_error(capsys, "run", "-q", "model.chat_template=x")


def test_a_data_file_given_as_a_recipe(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "rows.json").write_text(json.dumps([GOOD]))
    assert "rows.json: found a list; expected a recipe: keys and values" in read_error(capsys, "run", "rows.json")


def test_lengths_beyond_the_models_context(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, tokens, stage in (
        ("max_completion_tokens=500", 500, "SFT"),
        ("sweep={ppo.max_completion_tokens: [501]}", 501, "PPO"),
    ):
        printed = read_error(capsys, "run", "-q", setting)
        assert f"found 64 beside max_completion_tokens {tokens} of {stage}; expected at most 512 together" in printed
    assert not list(working_folder.glob("runs/cache/sft"))


def test_a_cache_that_cannot_be_written(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "cache").write_text("mine")
    for command in (["run", "-q"], ["plan"], ["select", "-q"]):
        (line,) = read_error(capsys, *command, "cache=cache").splitlines()
        assert "cache: found a place that cannot be written" in line
    (line,) = read_error(capsys, "plan", f"cache={'x' * 300}").splitlines()
    assert "found a place that cannot be written (File name too long)" in line
    assert (working_folder / "cache").read_text() == "mine"


def test_a_damaged_cache_is_one_line(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where the stage's folder, that of all locks, or its lock is to be; nothing of it is lost."""
    stage_cache = StageCache((working_folder / "cache").resolve(), Runtime(threads=1))
    folder, locks = stage_cache.folder(Pretrained()), working_folder / "cache" / "locks"
    for file in (locks, folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        (line,) = read_error(capsys, "run", "-q", "cache=cache").splitlines()
        assert line.startswith(str(file))
        assert "found a place that cannot be written (" in line
        assert file.read_text() == "mine"
        file.unlink()
    (folder / SETTINGS).mkdir(parents=True)
    assert f"{folder}: found a place that cannot be written (" in read_error(capsys, "run", "-q", "cache=cache")


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '{"cost": {"sec', "", None], ids=repr)
def test_a_damaged_summary_is_told_before_anything_computes(
    working_folder: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    stage_cache = StageCache((working_folder / "cache").resolve(), Runtime(threads=1))
    recipe = read_recipe("world", ["cache=cache"])
    last = expand_arms(recipe)[-1].evaluation
    summary = stage_cache.folder(last) / SUMMARY
    summary.parent.mkdir(parents=True)
    write_json(summary.parent / SETTINGS, last.model_dump(mode="json"))
    if content is None:
        summary.mkdir()
    else:
        summary.write_text(content)
    for command in (["plan"], ["run", "-q"]):
        (line,) = read_error(capsys, *command, "cache=cache").splitlines()
        assert f"{summary}: found no readable summary" in line
        assert "delete the stage's folder and run again" in line
    assert not list((working_folder / "cache").glob("pretrained/*"))
    assert summary.exists()


@pytest.mark.parametrize("name", ["models", "models/sft-0", "recipe.yaml", "report.html", "results.json"])
def test_what_stands_in_the_way_of_results_is_told_before_anything_computes(
    working_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    place = working_folder / "runs" / "world" / name
    if name == "models":
        place.parent.mkdir(parents=True)
        place.write_text("mine")
    else:
        place.mkdir(parents=True)
    (line,) = read_error(capsys, "run", "-q").splitlines()
    assert line.startswith(f"runs/world/{name}: found ")
    assert not list((working_folder / "runs" / "cache").glob("*"))
    assert place.exists()


def test_ctrl_c_says_that_nothing_is_lost(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixpo.stages.data import Data

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Data, "compute", interrupt)
    monkeypatch.setattr(sys, "argv", ["mixpo", "run", "-q"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130


def test_a_line_that_is_not_json_and_a_file_that_is_not_there(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (working_folder / "rows.jsonl").write_text(json.dumps(GOOD) + "\n{oops\n")
    assert "rows.jsonl:2:" in read_error(capsys, "run", "-q", "data.format=preference", "data.train=rows.jsonl")
    printed = read_error(capsys, "run", "-q", "data.format=preference", "data.train=row.jsonl")
    assert "row.jsonl: no such file" in printed
    assert "did you mean 'rows.jsonl'" in printed


def test_nothing_left_after_dropping(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(working_folder / "rows.jsonl", [{**GOOD, "chosen": ""}])
    words = ("run", "-q", "data.format=preference", "data.train=rows.jsonl", "data.on_bad_row=drop")
    assert "nothing is left of 1 rows" in read_error(capsys, *words)


def test_a_second_share_that_leaves_nothing_to_train_on(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(working_folder / "rows.jsonl", [{**GOOD, "prompt": f"How {number}?"} for number in range(8)])
    words = ("run", "-q", "data.format=preference", "data.train=rows.jsonl", "data.test=rows.jsonl")
    printed = read_error(capsys, *words, "data.second_rows=20")
    assert "data.second_rows: found 20 of 8 train rows, which leaves none to train on" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = read_error(capsys, "run", "-q", "runtime.device=cuda")
    assert "world: runtime.device: found 'cuda'; expected cpu or auto here: torch finds no CUDA device" in printed


def test_a_folder_that_cannot_be_written(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "file").write_text("")
    assert "cannot be written" in read_error(capsys, "run", "-q", "out=file/run")


def test_a_run_folder_of_another_version(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "old").mkdir()
    (working_folder / "old" / "results.json").write_text('{"format": 0}')
    assert "found a run folder of format 0, written by another version" in read_error(capsys, "run", "-q", "out=old")
    assert "found a run folder of format 0" in read_error(capsys, "report", "old")
    assert "found no results.json" in read_error(capsys, "report", ".")
    for broken in ('{"form', '{"format": 3}', "[]"):
        (working_folder / "old" / "results.json").write_text(broken)
        assert "results.json: found no results of mixpo" in read_error(capsys, "compare", "old")


def test_a_model_folder_without_tokenizer(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "model").mkdir()
    (working_folder / "model" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
    )
    assert "found a model without a tokenizer" in read_error(capsys, "run", "-q", "model.path=model")
    assert "found no config.json" in read_error(capsys, "chat", str(working_folder))


def test_every_shipped_recipe_is_valid() -> None:
    import mixpo.recipes

    names = [path.stem for path in Path(mixpo.recipes.__path__[0]).glob("*.yaml")]
    assert {"world", "paper-world", "noise-world", "pairs", "hh-rlhf", "hh-rlhf-smollm2", "tldr-smollm2"} <= set(names)
    generated = ["data.format=world", "data.train=[]", "data.test=[]", "data.demonstrations=[]", "data.second=[]"]
    for name in names:
        recipe = read_recipe(name, ["model.path=world", *generated])
        assert recipe.name == name
        runs = expand_arms(recipe)
        assert [run.arm for run in runs if not run.changes] == list(recipe.arms) * len(recipe.seeds)
        assert any(run.changes for run in runs) == bool(recipe.sweep)


def test_a_changed_kl_coef_changes_ppo_and_its_evaluation_only(working_folder: Path) -> None:
    def identities(*overrides: str) -> dict[tuple[str, str, str], str]:
        planned = plan_stages(read_recipe("world", overrides))
        return {(arm, line.kind, line.field): line.identity for arm, lines in planned for line in lines}

    one, other = identities(), identities("ppo.kl_coef=0.2")
    changed = {key for key in one if one[key] != other[key]}
    assert {kind for _, kind, _ in changed} == {"PPO", "Evaluation"}
    assert {arm for arm, _, _ in changed} == {"ppo (seed 0)", "mpo (seed 0)"}


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, mixpo.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_plan_shows_sweeps_traces_and_gradients(working_folder: Path) -> None:
    overrides = [
        "arms=[sft,mpo]",
        "sweep={ppo.kl_coef: [0.2]}",
        "trace={arms: [mpo], snapshots: 1}",
        "gradients.pairs=2",
    ]
    planned = dict(plan_stages(read_recipe("world", overrides)))
    assert list(planned)[:3] == ["sft (seed 0)", "mpo (seed 0)", "mpo ppo.kl_coef=0.2 (seed 0)"]
    assert "gradients of dpo-easy on hard (seed 0)" in planned
    assert {line.field for line in planned["mpo (seed 0)"] if line.depth == 0} == {"", "trace 0", "trace 1"}
