"""Recipes as YAML: what a value may be, and what a hostile file cannot do."""

import re
import sys
from pathlib import Path

import pytest

from mixpo.cli import main as cli
from mixpo.data.errors import InputError
from mixpo.experiments.plan import plan
from mixpo.experiments.recipe import LARGEST, read_recipe

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
    assert plan(recipe)
    words = ["mixpo", "run", "-q", "name=${oc.env:OPENAI_API_KEY}", f"out={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert SECRET not in printed.out + printed.err
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
        ("? [a]\n: 1", "a key that is no text in line 1"),
        ("ppo:\n  kl_coef: 1\n  kl_coef: 2\n", "a key that stands there twice in line 2"),
        ("name: 'a", "found unexpected end of stream"),
        ("name: \0", "unacceptable character"),
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
    (tmp_path / "big.yaml").write_text("name: a\n#" + "x" * LARGEST)
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
