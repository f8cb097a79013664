"""Recipes as YAML: what a value may be, and what a hostile file cannot do."""

import os
import re
from pathlib import Path

import pytest

from command_line import run_mixpo
from mixpo.data.errors import InputError
from mixpo.experiments.plan import list_plan
from mixpo.experiments.recipe import MAX_RECIPE_BYTES, Recipe, _get_section_types, read_recipe
from mixpo.models.adapters import LoraSettings

SECRET = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    "text", ["${oc.env:OPENAI_API_KEY}", "${name}", "a ${ppo.seed} b", "[x, {y: '${oc.env:HOME}'}]"]
)
def test_nothing_is_read_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    expected = r"found no readable YAML (an interpolation ${...}; recipes read nothing from elsewhere: write the value"
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: world\nname: mine\nmodel:\n  chat_template: {text}\n")
    for given in ((str(file), []), ("world", [f"model.chat_template={text}"])):
        with pytest.raises(InputError, match=re.escape(expected)) as error:
            read_recipe(*given)
        assert SECRET not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"mine\.yaml: .* in line 4\)"):
        read_recipe(str(file))


def test_a_key_in_the_environment_is_in_nothing_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jinja knows no `${...}`: a chat template may hold the two signs, and prints them."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    template = "${{ messages[0].content }}${ x }"
    recipe = read_recipe("world", [f"model.chat_template='{template}'", f"cache={tmp_path / 'cache'}"])
    assert recipe.model.chat_template == template
    assert list_plan(recipe)
    result = run_mixpo(capsys, "run", "-q", "name=${oc.env:OPENAI_API_KEY}", f"out={tmp_path / 'run'}")
    assert result.code == 2
    assert SECRET not in result.out + result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("2.5E4", 25_000.0),
        ("-1e+2", -100.0),
        ("0.2", 0.2),
        ("[1e-3, 2]", [0.001, 2]),
        ("12", 12),
        ("2026-11-22", "2026-11-22"),
        ("null", None),
        ("", None),
        ("hub:a/b", "hub:a/b"),
        ("{a.b: [1], 3: true}", {"a.b": [1], "3": True}),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a file and on the command line."""
    given: list[object] = []
    monkeypatch.setattr("mixpo.experiments.recipe.Recipe", lambda **values: given.append(values["best_of"]))
    read_recipe("world", [f"best_of={text}"])
    assert given == [expected]
    assert type(given[0]) is type(expected)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: *c\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (BOMB, "an alias; write the value again in line 2"),
        ("a: &a [*a]\n", "an alias; write the value again in line 1"),
        ("[" * 100_000, "too deeply nested"),
        ("{a: " * 100_000, "too deeply nested"),
        ("seeds: [" + "9" * 5_000 + "]", "Exceeds the limit"),
        ("seeds: [0x" + "f" * 5_000 + "]", "a whole number beyond 64 bits in line 1"),
        ("name: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("? [a]\n: 1", "a key that is not text in line 1"),
        ("ppo:\n  kl_coef: 1\n  kl_coef: 2\n", "a duplicate key in line 2"),
        ("name: 'a", "found unexpected end of stream"),
        ("name: \0", "unacceptable character"),
        ('cache: "a\\0b"', "NUL or half a surrogate pair in line 1"),
        ('cache: "\\ud800"', "NUL or half a surrogate pair in line 1"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"mine\.yaml: found no readable YAML \({re.escape(problem)}") as error:
        read_recipe(str(file))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(file)) + 300


def test_values_and_files_of_any_length_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_recipe("world", ["name=" + "x" * 100_000 + "/"])
    assert len(str(error.value)) < 400
    (tmp_path / "big.yaml").write_text("name: a\n#" + "x" * MAX_RECIPE_BYTES)
    with pytest.raises(InputError, match=r"big\.yaml: found more than 1,048,576 bytes; expected a recipe"):
        read_recipe(str(tmp_path / "big.yaml"))


def test_an_override_lies_over_what_the_recipe_gives(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: world\nname: mine\nsweep: {arms: [ppo], ppo.kl_coef: [0.3]}\n")
    words = ["ppo.kl_coef=0.5", "arms=[ppo,mpo]", "ppo={clip: 0.3}", "data.train=a.jsonl", "sweep.seed_of=null"]
    recipe = read_recipe(str(tmp_path / "mine.yaml"), words[:4])
    assert (recipe.ppo.kl_coef, recipe.ppo.clip, recipe.arms) == (0.5, 0.3, ("ppo", "mpo"))
    assert recipe.data.train == ("a.jsonl",)
    assert recipe.sweep[0].values == {"ppo.kl_coef": (0.3,)}
    with pytest.raises(InputError, match="sweep"):
        read_recipe(str(tmp_path / "mine.yaml"), words)


def list_number_keys() -> list[tuple[str, bool]]:
    """The dotted key of every setting that is a number, or several, and whether it is whole."""
    sections = {f"{name}.": section for name, section in _get_section_types().items()}
    groups = {"": Recipe, "ppo.lora.": LoraSettings, **sections}
    found = []
    for start, group in groups.items():
        for key, field in group.model_fields.items():
            kind = str(field.annotation)
            if re.search(r"\b(int|float)\b", kind) and "bool" not in kind:
                found.append((start + key, "float" not in kind))
    return found


def read_error(*overrides: str) -> str:
    """The one line in which a recipe is refused."""
    with pytest.raises(InputError) as error:
        read_recipe("world", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("key", "whole"), list_number_keys())
def test_no_number_is_true_below_zero_or_endless(key: str, whole: bool) -> None:
    several = {"seeds": "[{}]", "adam_betas": "[0.9, {}]"}.get(key.rpartition(".")[2], "{}")
    for value in ("true", "-1", ".nan", ".inf"):
        assert read_error(f"{key}={several.format(value)}").startswith(f"world: {key}")
    if not whole:
        assert read_error(f"{key}={several.format('.inf')}").endswith("expected a finite number")


def test_there_are_numbers_to_look_at() -> None:
    assert {"seeds", "best_of", "sft.adam_betas", "ppo.lora.alpha", "data.test_share", "gradients.pairs"} <= {
        key for key, _ in list_number_keys()
    }


TARGETS = "expected all-linear, or a list of names of layers, such as [q_proj, v_proj]"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds=[true]", "world: seeds: found [True]; expected a number, not true or false"),
        ("seeds=[0,-1]", "world: seeds.1: found -1; expected greater than or equal to 0"),
        ("seeds=[]", "world: seeds: found []; expected at least one value"),
        ("seeds=3", "world: seeds: found 3; expected a list"),
        ("arms=[1]", "world: arms.0: found 1; expected a valid string"),
        ("sweep={ppo.kl_coef: []}", "world: sweep.0.ppo.kl_coef: found []; expected at least one value"),
        ("sweep={ppo.kl_coef: 0.1}", "world: sweep.0.ppo.kl_coef: found 0.1; expected a list"),
        ("sweep=[{arms: [], ppo.kl_coef: [1]}]", "world: sweep.0.arms: found []; expected at least one value"),
        ("model=null", "world: model: found nothing; expected keys and values"),
        ("ppo=false", "world: ppo: found False; expected keys and values"),
        ("ppo.adam_betas=[1,0.5]", "world: ppo.adam_betas.0: found 1; expected less than 1"),
        ("cache=null", "world: cache: found nothing; expected a path"),
        ("precision=fp16", "world: precision: found 'fp16'; expected 'float32' or 'bfloat16'"),
        ("lora=3", "world: lora: found 3; expected keys and values"),
        ("lora.rnk=3", "world: lora.rnk: unknown key; did you mean rank?"),
        ("lora.target_modules=q_proj", f"world: lora.target_modules: found 'q_proj'; {TARGETS}"),
        ("lora.target_modules=[]", f"world: lora.target_modules: found []; {TARGETS}"),
        ("sft.lora.target_modules=[1]", f"world: sft.lora.target_modules: found [1]; {TARGETS}"),
        ("infra.stages.PPO.nodes=0", "world: infra.stages.PPO.nodes: found 0; expected greater than or equal to 1"),
        (
            "model.template_arguments={a: [1]}",
            "world: model.template_arguments.0.1: found [1]; "
            "expected true or false or a valid integer or a valid number or a valid string",
        ),
    ],
)
def test_silly_settings_are_one_line(override: str, expected: str) -> None:
    assert read_error(override) == expected


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b", "", "a\\n"])
def test_a_recipes_name_is_that_of_a_folder(name: str) -> None:
    expected = "expected a folder's name: letters, digits, -, _, and . but not at its beginning"
    assert read_error(f'name="{name}"').startswith("world: name: found '")
    assert read_error(f'name="{name}"').endswith(expected)


@pytest.mark.parametrize(
    "path", ["my model", "a/b/c", "hub:", "hub:gpt2", "gpt2/", "", "http://host/gpt2", "a..b", "./a", "/a/b", "~/a"]
)
def test_what_can_be_no_model_is_refused_without_the_network(path: str) -> None:
    assert read_error(f'model.path="{path}"').startswith(
        f"world: model.path: found '{path}', which does not exist here and is not a valid Hugging Face id; expected a "
    )


@pytest.mark.parametrize("path", ["gpt2", "meta-llama/Llama-2-7b-hf", "package:own/x.gguf", "x.gguf"])
def test_what_may_be_a_model_is_looked_for_later(path: str) -> None:
    assert read_recipe("world", [f"model.path={path}"]).model.path == path


def test_a_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("my model", "./my model", "~/my model", "my model/"):
        assert read_recipe("world", [f"model.path={path}"]).model.path == path


@pytest.mark.parametrize("name", ["hub:", "hub:/x", "hub:a b/c", "hub:a/"])
def test_what_can_be_no_data_set_is_refused_without_the_network(name: str) -> None:
    for key in ("train", "test", "demonstrations", "second"):
        assert f"{name}" in (message := read_error("data.format=preference", f'data.{key}=["hub:a/b", "{name}"]'))
        assert "expected hub:OWNER/NAME or hub:OWNER/NAME/DATA_DIR" in message


def test_what_may_be_a_data_set_is_looked_for_later() -> None:
    names = ["hub:imdb", "hub:Anthropic/hh-rlhf", "hub:Anthropic/hh-rlhf/helpful-base", "hub:a/b/c/d"]
    recipe = read_recipe("world", ["data.format=preference", f"data.train={names}"])
    assert recipe.data.train == tuple(names)


def test_a_shared_lora_is_every_sections_but_where_one_has_its_own() -> None:
    recipe = read_recipe("world", ["lora.rank=4", "ppo.lora=null"])
    assert recipe.sft.lora == recipe.dpo.lora == LoraSettings(rank=4)
    assert recipe.ppo.lora is None
    assert Recipe(**recipe.dump_settings()) == recipe.with_changes({})


def test_no_name_at_all_is_no_name_of_a_recipe() -> None:
    with pytest.raises(InputError, match="'': found neither a recipe file nor a recipe of that name"):
        read_recipe("")


@pytest.mark.parametrize("override", [".=3", "ppo.=3", ".ppo=3", "ppo..clip=3", "=3", "world"])
def test_an_override_has_a_key(override: str) -> None:
    expected = f"{override!r}: found no key=value; expected one such as ppo.kl_coef=0.2 after the recipe"
    assert read_error(override) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_no_recipe_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(InputError, match=f"{name}: found something other than a file; expected a recipe"):
            read_recipe(str(tmp_path / name))
    for name in (f"{'x' * 300}.yaml", "x" * 300):
        with pytest.raises(InputError, match=r"x: found neither|yaml: found no readable recipe file"):
            read_recipe(name)
