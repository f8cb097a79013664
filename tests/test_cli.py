"""The command line on bad input: one clear line, exit code 2, no traceback, nothing lost; and `mixpo plan`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from command_line import run_mixpo
from mixpo.experiments.expressions import list_arm_runs
from mixpo.experiments.plan import list_plan
from mixpo.experiments.recipe import read_recipe
from mixpo.stages.data import Data
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


ReadError = Callable[..., str]


@pytest.fixture
def read_error(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> ReadError:
    """A function that runs `mixpo WORDS`, expects exit code 2, and returns what it printed on standard error."""

    def run(*words: str) -> str:
        result = run_mixpo(capsys, *words)
        assert result.code == 2
        return result.err

    return run


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
        ("arms=[sft,dpo,dpo]", "world: arms: found ['sft', 'dpo', 'dpo']; expected each only once; 'dpo' is repeated"),
        ("seeds=[0,0]", "world: seeds: found [0, 0]; expected each only once; 0 is repeated"),
        ("model.path=./nowhere", "world: model.path: found './nowhere', which does not exist here"),
        ("model.path=package:no_such_package/x.gguf", "no package 'no_such_package' is installed"),
    ],
)
def test_bad_keys_and_values(read_error, override, expected):
    assert expected in read_error("plan", override)


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
        ("plan ppo.kl_coef = 0.2", "ppo.kl_coef: found neither a recipe file nor a recipe of that name; expected a"),
        ("data preview ", "'': found neither a recipe file nor a recipe of that name; expected a .yaml file"),
    ],
)
def test_a_hasty_command_line_is_one_line(read_error, words, expected):
    (line,) = read_error(*words.split(" ")).splitlines()
    assert line.startswith(expected)


def test_no_command_at_all_shows_the_help(capsys):
    for words, code in (([], 2), (["-h"], 0), (["data"], 2), (["chat", "-h"], 0)):
        result = run_mixpo(capsys, *words)
        assert result.code == code
        assert "Usage: mixpo" in result.out + result.err


def test_what_a_recipe_leaves_open_must_be_given(read_error):
    assert read_error("plan", "pairs").splitlines() == [
        "pairs: data.train: not given; expected for example data.train=PATH",
        "pairs: model.path: not given; expected for example model.path=PATH",
    ]


def test_several_problems_at_once(read_error):
    assert len(read_error("run", "ppo.clipp=1", "dpo.beta=0", "sft.epochs=0").splitlines()) == 3


def format_rows(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


USER = {"role": "user", "content": "How?"}
SYSTEM = {"role": "system", "content": "Be brief."}
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
RECIPE = (
    "name: mine\narms: [sft]\nselection: {threshold: 1}\nmax_completion_tokens: 64\n"
    f'model: {{chat_template: "{NO_SYSTEM}"}}\n'
    "data: {format: preference, max_prompt_tokens: 64, train: rows.jsonl}\n"
)
LLAMA = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
READ_ROWS = "run -q data.format=preference data.train=rows.jsonl"


@pytest.mark.parametrize(
    ("files", "words", "expected"),
    [
        ({"mine.yaml": "name: mine"}, "run mime.yaml", "did you mean mine.yaml?"),
        ({}, "run wrld", "expected a .yaml file or one of … did you mean world?"),
        ({"bad.yaml": "a: ["}, "run bad.yaml", "bad.yaml: found no readable YAML"),
        ({"rows.json": json.dumps([GOOD])}, "run rows.json", "rows.json: found a list; expected a recipe: keys and"),
        ({}, "run data.format=preference data.train=no/rows.jsonl", "no/rows.jsonl: no such file"),
        ({}, "plan data.format=preference data.train=no/rows.jsonl", "no/rows.jsonl: no such file"),
        ({}, "select data.format=preference data.train=no/rows.jsonl", "no/rows.jsonl: no such file"),
        (
            {"rows.jsonl": format_rows(GOOD)},
            "run -q data.format=preference data.train=row.jsonl",
            "row.jsonl: no such file … did you mean 'rows.jsonl'",
        ),
        ({"rows.jsonl": format_rows(GOOD) + "{oops\n"}, READ_ROWS, "rows.jsonl:2:"),
        (
            {"rows.jsonl": format_rows(GOOD, {**GOOD, "prompt": [USER]})},
            READ_ROWS,
            "rows.jsonl:2: 'prompt' is a list, the first row's is not; expected one kind",
        ),
        (
            {
                "rows.jsonl": format_rows({**GOOD, "prompt": [USER]}, {**GOOD, "prompt": [SYSTEM, USER]}),
                "recipe.yaml": RECIPE,
            },
            "run -q recipe.yaml",
            "rows.jsonl:2: 'prompt' is refused by the tokenizer's chat template (no system)",
        ),
        (
            {"rows.jsonl": format_rows({**GOOD, "chosen": ""})},
            f"{READ_ROWS} data.on_bad_row=drop",
            "nothing is left of 1 rows",
        ),
        (
            {"rows.jsonl": format_rows(*({**GOOD, "prompt": f"How {number}?"} for number in range(8)))},
            f"{READ_ROWS} data.test=rows.jsonl data.second_rows=20",
            "data.second_rows: found 20 of 8 train rows, which leaves none to train on",
        ),
        ({}, "run -q model.chat_template=x", "does not write an assistant's message"),
        ({"file": ""}, "run -q out=file/run", "cannot be written"),
        ({"old/results.json": '{"format": 0}'}, "run -q out=old", "found a run folder of format 0, written by another"),
        ({"old/results.json": '{"format": 0}'}, "report old", "found a run folder of format 0, written by another"),
        ({}, "report .", "found no results.json"),
        ({"old/results.json": '{"form'}, "compare old", "results.json: found no results of mixpo"),
        ({"old/results.json": '{"format": 3}'}, "compare old", "results.json: found no results of mixpo"),
        ({"old/results.json": "[]"}, "compare old", "results.json: found no results of mixpo"),
        ({"model/config.json": LLAMA}, "run -q model.path=model", "found a model without a tokenizer"),
        ({}, "chat .", "found no config.json"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(working_folder, read_error, files, words, expected):
    for name, text in files.items():
        (working_folder / name).parent.mkdir(exist_ok=True)
        (working_folder / name).write_text(text)
    printed = read_error(*words.split())
    assert all(part in printed for part in expected.split(" … "))


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
def test_bad_rows_end_the_run_before_anything_trains(working_folder, read_error, row, expected):
    (working_folder / "rows.jsonl").write_text(format_rows(GOOD, row))
    printed = read_error(*READ_ROWS.split())
    assert expected in printed
    assert "`data.on_bad_row: drop`" in printed
    assert "expected at most 512 together" in read_error("select", "-q", "max_completion_tokens=500")
    assert not list(working_folder.glob("runs/cache/sft"))


def test_lengths_beyond_the_models_context(working_folder, read_error):
    for setting, tokens, stage in (
        ("max_completion_tokens=500", 500, "SFT"),
        ("sweep={ppo.max_completion_tokens: [501]}", 501, "PPO"),
    ):
        printed = read_error("run", "-q", setting)
        assert f"found 64 beside max_completion_tokens {tokens} of {stage}; expected at most 512 together" in printed
    assert not list(working_folder.glob("runs/cache/sft"))


def test_a_cache_that_cannot_be_written(working_folder, read_error):
    (working_folder / "cache").write_text("mine")
    for command in (["run", "-q"], ["plan"], ["select", "-q"]):
        (line,) = read_error(*command, "cache=cache").splitlines()
        assert "cache: found a place that cannot be written" in line
    (line,) = read_error("plan", f"cache={'x' * 300}").splitlines()
    assert "found a place that cannot be written (File name too long)" in line
    assert (working_folder / "cache").read_text() == "mine"


def test_a_damaged_cache_is_one_line(working_folder, read_error):
    """A file where the stage's folder, that of all locks, or its lock is to be; nothing of it is lost."""
    stage_cache = StageCache((working_folder / "cache").resolve(), Runtime(threads=1))
    folder, locks = stage_cache.locate_folder(Pretrained()), working_folder / "cache" / "locks"
    for file in (locks, folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        (line,) = read_error("run", "-q", "cache=cache").splitlines()
        assert line.startswith(str(file))
        assert "found a place that cannot be written (" in line
        assert file.read_text() == "mine"
        file.unlink()
    (folder / SETTINGS).mkdir(parents=True)
    assert f"{folder}: found a place that cannot be written (" in read_error("run", "-q", "cache=cache")


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '{"cost": {"sec', "", None], ids=repr)
def test_a_damaged_summary_is_told_before_anything_computes(working_folder, read_error, content):
    stage_cache = StageCache((working_folder / "cache").resolve(), Runtime(threads=1))
    recipe = read_recipe("world", ["cache=cache"])
    last = list_arm_runs(recipe)[-1].evaluation
    summary = stage_cache.locate_folder(last) / SUMMARY
    summary.parent.mkdir(parents=True)
    write_json(summary.parent / SETTINGS, last.model_dump(mode="json"))
    if content is None:
        summary.mkdir()
    else:
        summary.write_text(content)
    for command in (["plan"], ["run", "-q"]):
        (line,) = read_error(*command, "cache=cache").splitlines()
        assert f"{summary}: found no readable summary" in line
        assert "delete the stage's folder and run again" in line
    assert not list((working_folder / "cache").glob("pretrained/*"))
    assert summary.exists()


@pytest.mark.parametrize("name", ["models", "models/sft-0", "recipe.yaml", "report.html", "results.json"])
def test_what_stands_in_the_way_of_results_is_told_before_anything_computes(working_folder, read_error, name):
    place = working_folder / "runs" / "world" / name
    if name == "models":
        place.parent.mkdir(parents=True)
        place.write_text("mine")
    else:
        place.mkdir(parents=True)
    (line,) = read_error("run", "-q").splitlines()
    assert line.startswith(f"runs/world/{name}: found ")
    assert not list((working_folder / "runs" / "cache").glob("*"))
    assert place.exists()


def test_ctrl_c_says_that_nothing_is_lost(working_folder, capsys, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Data, "compute", interrupt)
    assert run_mixpo(capsys, "run", "-q").code == 130


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(read_error):
    printed = read_error("run", "-q", "runtime.device=cuda")
    assert "runtime.device: found 'cuda' for process 1 of a machine; expected a CUDA device for each" in printed


def test_every_shipped_recipe_is_valid():
    import mixpo.recipes

    names = [path.stem for path in Path(mixpo.recipes.__path__[0]).glob("*.yaml")]
    assert {"world", "paper-world", "noise-world", "pairs", "hh-rlhf", "hh-rlhf-smollm2", "tldr-smollm2"} <= set(names)
    generated = ["data.format=world", "data.train=[]", "data.test=[]", "data.demonstrations=[]", "data.second=[]"]
    for name in names:
        recipe = read_recipe(name, ["model.path=world", *generated])
        assert recipe.name == name
        runs = list_arm_runs(recipe)
        assert [run.arm for run in runs if not run.changes] == list(recipe.arms) * len(recipe.seeds)
        assert any(run.changes for run in runs) == bool(recipe.sweep)


def test_a_changed_kl_coef_changes_ppo_and_its_evaluation_only(working_folder):
    def identities(*overrides: str) -> dict[tuple[str, str, str], str]:
        planned = list_plan(read_recipe("world", overrides))
        return {(arm, line.kind, line.field): line.identity for arm, lines in planned for line in lines}

    one, other = identities(), identities("ppo.kl_coef=0.2")
    changed = {key for key in one if one[key] != other[key]}
    assert {kind for _, kind, _ in changed} == {"PPO", "Evaluation"}
    assert {arm for arm, _, _ in changed} == {"ppo (seed 0)", "mpo (seed 0)"}


def test_importing_the_command_line_does_not_import_torch():
    code = "import sys, mixpo.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_plan_shows_sweeps_traces_and_gradients(working_folder):
    overrides = [
        "arms=[sft,mpo]",
        "sweep={ppo.kl_coef: [0.2]}",
        "trace={arms: [mpo], snapshots: 1}",
        "gradients.pairs=2",
    ]
    planned = dict(list_plan(read_recipe("world", overrides)))
    assert list(planned)[:3] == ["sft (seed 0)", "mpo (seed 0)", "mpo ppo.kl_coef=0.2 (seed 0)"]
    assert "gradients of dpo-easy on hard (seed 0)" in planned
    assert {line.field for line in planned["mpo (seed 0)"] if line.depth == 0} == {"", "trace 0", "trace 1"}
