"""Model folders that are not what they should be, and what is written of those that are."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from command_line import run_mixpo
from families import make_family
from mixpo import Pretrained, Runtime, StageCache
from mixpo.cli import main as cli
from mixpo.data.branches import pack_branches
from mixpo.data.errors import InputError
from mixpo.data.tokens import compute_tokenization_digest
from mixpo.models import loading
from mixpo.models.adapters import LoraSettings
from mixpo.models.exporting import export_model
from mixpo.models.folders import ModelFolder, read_end_tokens, read_policy_folder
from mixpo.models.loading import ModelLoader
from mixpo.models.saving import save_model
from mixpo.stages import pretrained
from mixpo.training.job import locate_model_folder

CPU = torch.device("cpu")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("smollm2", tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("zephyr", tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def text(name: str, content: str | bytes) -> Damage:
    """The whole file is something else."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda folder: [damage(folder) for damage in damages]


def as_folder(name: str) -> Damage:
    return both(removed(name), lambda folder: (folder / name).mkdir())


def cut(name: str, share: float) -> Damage:
    """A file ends too early."""
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The content of a JSON file is something else."""

    def damage(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        change(content)
        file.write_text(json.dumps(content))

    return damage


def keys(name: str, **values: Any) -> Damage:
    return edited(name, lambda content: content.update(values))


def template(content: Any) -> Damage:
    """Another chat template."""
    file = "chat_template.jinja"
    return both(lambda folder: (folder / file).unlink(missing_ok=True), keys(TOKENS, chat_template=content))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Other tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})

    return damage


def retyped(dtype: torch.dtype) -> Damage:
    return weights(lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))


def shards(remove: bool = True, **index: Any) -> Damage:
    """Weights in two files and an index."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        names = sorted(tensors)
        for number, part in enumerate((names[:5], names[5:])):
            save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        (folder / TENSORS).unlink()
        where = {name: f"model-{int(place >= 5)}.safetensors" for place, name in enumerate(names)}
        (folder / INDEX).write_text(json.dumps({"weight_map": where, **index}))
        if remove:
            (folder / "model-1.safetensors").unlink()

    return damage


def legacy(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Weights in pytorch_model.bin."""

    def damage(folder: Path) -> None:
        torch.save(change(load_file(folder / TENSORS)), folder / BIN)
        (folder / TENSORS).unlink()

    return damage


class HarmfulPickle:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENS, TENSORS = "tokenizer.json", "tokenizer_config.json", "model.safetensors"
INDEX, BIN = "model.safetensors.index.json", "pytorch_model.bin"
OWN_TOKENIZER = {"AutoTokenizer": ["evil.T", None]}
OWN_CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
NO_POLICY = "expected a causal language model"
TORN, FAILS = "found weights that cannot be read", "the chat template fails on a dialogue"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "config: list": (text(CONFIG, "[]"), r"config.json: found '\[\]'; expected a JSON object"),
    "config: null": (text(CONFIG, "null"), "config.json: found 'None'; expected a JSON object"),
    "config: text": (text(CONFIG, "hello"), "config.json: found something other than JSON"),
    "config: empty": (text(CONFIG, ""), "config.json: found something other than JSON"),
    "config: empty object": (text(CONFIG, "{}"), "names an architecture"),
    "config: latin-1": (text(CONFIG, b'{"a": "\xe9"}'), "config.json: found something other than JSON"),
    "config: torn": (cut(CONFIG, 0.5), "config.json: found something other than JSON"),
    "config: deep": (text(CONFIG, "[" * 100_000), "config.json: found something other than JSON"),
    "config: gone": (removed(CONFIG), "found no config.json"),
    "config: a folder": (as_folder(CONFIG), "config.json: found a file that cannot be read"),
    "config: unknown type": (keys(CONFIG, model_type="llamma"), "llamma"),
    "config: type is a number": (keys(CONFIG, model_type=3), "cannot be read"),
    "config: another type": (keys(CONFIG, model_type="gpt2"), r"found \['LlamaForCausalLM'\] of model_type 'gpt2'"),
    "config: classifier": (keys(CONFIG, architectures=["LlamaForSequenceClassification"]), NO_POLICY),
    "config: vision": (keys(CONFIG, architectures=["ViTModel"], model_type="vit"), NO_POLICY),
    "config: t5": (keys(CONFIG, architectures=["T5ForConditionalGeneration"], model_type="t5"), NO_POLICY),
    "config: no architecture": (keys(CONFIG, architectures=None), "names an architecture"),
    "config: architecture is a number": (keys(CONFIG, architectures=7), "found|cannot be read"),
    "config: huge vocabulary": (keys(CONFIG, vocab_size=10**12), "found vocab_size 1000000000000 in config.json"),
    "config: huge width": (keys(CONFIG, hidden_size=10**9), "found hidden_size 1000000000"),
    "config: many layers": (keys(CONFIG, num_hidden_layers=10**9), "found num_hidden_layers 1000000000"),
    "config: no layers": (keys(CONFIG, num_hidden_layers=0), "found num_hidden_layers 0"),
    "config: one layer more": (keys(CONFIG, num_hidden_layers=3), "found no tensor model.layers.2"),
    "config: one layer less": (keys(CONFIG, num_hidden_layers=1), "a tensor that the architecture has not, model.lay"),
    "config: negative width": (keys(CONFIG, hidden_size=-32), "found hidden_size -32"),
    "config: no heads": (keys(CONFIG, num_attention_heads=0), "found"),
    "config: odd heads": (keys(CONFIG, num_attention_heads=5), "cannot be read|another shape"),
    "config: text for a number": (keys(CONFIG, hidden_size="big"), "cannot be read"),
    "config: fraction": (keys(CONFIG, num_hidden_layers=1.5), "cannot be read"),
    "config: another width": (keys(CONFIG, intermediate_size=40), r"another shape: .*\[48, 32\]"),
    "config: unknown activation": (keys(CONFIG, hidden_act="no"), "cannot be read"),
    "config: unknown rotation": (keys(CONFIG, rope_parameters={"rope_type": "no"}), "cannot be read"),
    "config: quantized": (keys(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), "quantiz"),
    "config: own code": (keys(CONFIG, model_type="mine", auto_map=OWN_CODE), "needs Python of its own"),
    "adapters alone": (keys("adapter_config.json", base_model_name_or_path="x/y"), "found adapters"),
    "config: pad is far": (
        keys(CONFIG, pad_token_id=5000),
        r"found pad_token_id 5000 in config.json; expected a token of the vocabulary, 0 to \d+, or none",
    ),
    "config: pad is a word": (keys(CONFIG, pad_token_id="<pad>"), "found pad_token_id '<pad>'|cannot be read"),
    "generation: list": (text(GENERATION, "[]"), "generation_config.json: found"),
    "generation: torn": (cut(GENERATION, 0.5), "generation_config.json: found something other than JSON"),
    "generation: end is a word": (keys(GENERATION, eos_token_id="abc"), "found eos_token_id 'abc'|cannot be read"),
    "generation: end is far": (keys(GENERATION, eos_token_id=10**6), "found eos_token_id 1000000"),
    "generation: end is negative": (keys(GENERATION, eos_token_id=[1, -1]), "found eos_token_id -1"),
    "tokenizer: torn": (cut(TOKENIZER, 0.7), "tokenizer.json: found something other than JSON"),
    "tokenizer: empty object": (text(TOKENIZER, "{}"), "found a tokenizer"),
    "tokenizer: list": (text(TOKENIZER, "[]"), "tokenizer.json: found"),
    "tokenizer: no model": (keys(TOKENIZER, model=None), "found a tokenizer"),
    "tokenizer: another kind": (keys(TOKENIZER, model={"type": "no"}), "found a tokenizer"),
    "tokenizer: gone": (both(removed(TOKENIZER), removed(TOKENS)), "found a model without a tokenizer"),
    "tokenizer config: list": (text(TOKENS, "[]"), "tokenizer_config.json: found"),
    "tokenizer config: torn": (cut(TOKENS, 0.5), "tokenizer_config.json: found something other than JSON"),
    "tokenizer config: own code": (keys(TOKENS, tokenizer_class="Mine", auto_map=OWN_TOKENIZER), "found a tokenizer"),
    "template: a number": (template(7), "found a"),
    "template: broken": (template("{% if %}"), FAILS),
    "template: raises": (template("{{ raise_exception('no') }}"), FAILS),
    "template: divides by nothing": (template("{{ 1 // 0 }}"), FAILS),
    "template: endless range": (template("{% for i in range(10**9) %}x{% endfor %}"), FAILS),
    "special tokens: list": (text("special_tokens_map.json", "[1]"), "special_tokens_map.json: found"),
    "added tokens: torn": (text("added_tokens.json", '{"a"'), "added_tokens.json: found something other than JSON"),
    "weights: gone": (removed(TENSORS), "found no weights"),
    "weights: empty": (text(TENSORS, b""), TORN),
    "weights: torn": (cut(TENSORS, 0.6), TORN),
    "weights: torn header": (cut(TENSORS, 0.001), TORN),
    "weights: noise": (text(TENSORS, b"\xff" * 999), TORN),
    "weights: a pointer": (text(TENSORS, "version https://git-lfs.github.com/spec/v1\n"), TORN),
    "weights: a folder": (as_folder(TENSORS), "found no weights"),
    "weights: no tensors": (weights(dict.clear), "found no tensors"),
    "weights: one missing": (weights(lambda t: t.pop(UP)), f"found no tensor {UP}; expected exactly"),
    "weights: one more": (weights(lambda t: t.update(v_head=torch.zeros(3))), "the architecture has not, v_head;"),
    "weights: one renamed": (
        weights(lambda t: t.update(norm=t.pop("model.norm.weight"))),
        "found no tensor model.norm.weight; a tensor that the architecture has not, norm;",
    ),
    "weights: all renamed": (
        weights(lambda t: t.update({f"net.{name}": t.pop(name) for name in list(t)})),
        "found no tensor lm_head.weight, model.embed_tokens.weight",
    ),
    "weights: another shape": (weights(lambda t: t.update({UP: torch.zeros(48, 31)})), rf"shape: {UP} \[48, 31\]"),
    "weights: integers": (retyped(torch.int8), f"found tensor {UP} of type I8"),
    "weights: float8": (retyped(torch.float8_e4m3fn), f"found tensor {UP} of type F8_E4M3"),
    "weights: all integers": (
        weights(lambda t: t.update({name: tensor.int() for name, tensor in t.items()})),
        "of type I32; expected weights in float32",
    ),
    "weights: fewer embeddings": (
        weights(lambda t: t.update({EMBEDDING: t[EMBEDDING][:-9].clone()})),
        rf"another shape: .*{EMBEDDING}|found vocab_size",
    ),
    "embeddings: fewer than tokens": (
        both(weights(lambda t: t.update({EMBEDDING: t[EMBEDDING][:400].clone()})), keys(CONFIG, vocab_size=400)),
        r"found a tokenizer with token \d+ \(.*\) and embeddings of 400 rows",
    ),
    "shards: one gone": (shards(), "found no model-1.safetensors, which model.safetensors.index.json names"),
    "shards: no map": (shards(weight_map=None), "found no weight_map"),
    "shards: map of numbers": (shards(weight_map={"a": 1}), "found no weight_map"),
    "shards: elsewhere": (
        shards(weight_map={UP: "../model.safetensors"}),
        r"index.json: found '../model.safetensors'; expected names of files beside it",
    ),
    "shards: torn index": (both(shards(remove=False), cut(INDEX, 0.5)), "index.json: found something other than JSON"),
    "shards: torn shard": (both(shards(remove=False), cut("model-1.safetensors", 0.5)), f"model-1.safetensors: {TORN}"),
    "bin: torn": (both(legacy(lambda t: t), cut(BIN, 0.5)), TORN),
    "bin: one missing": (legacy(lambda t: {k: v for k, v in t.items() if k != UP}), f"found no tensor {UP}"),
    "bin: code": (legacy(lambda t: {**t, "x": HarmfulPickle()}), TORN),
    "bin: a list": (legacy(lambda t: [1, 2]), TORN),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    damage, expected = DAMAGES[kind]
    damage(folder)
    capfd.readouterr()
    with pytest.raises(InputError, match=expected) as refused:
        read_policy_folder(folder)
    message = str(refused.value)
    assert message.startswith(str(folder))
    assert len(message.splitlines()) == 1
    assert capfd.readouterr() == ("", ""), "no noise, and nothing of a pickle ran"


def test_the_same_folder_undamaged_is_taken(folder: Path, untied: Path) -> None:
    for one in (folder, untied):
        assert read_policy_folder(one).dtype == torch.float32
        ModelLoader(CPU).load_policy(one)


@pytest.fixture
def run_refused_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a command beside the model folder, which is to exit with code 2: its errors."""

    def run(*words: str) -> str:
        monkeypatch.chdir(folder.parent)
        monkeypatch.setattr(sys, "argv", ["mixpo", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        return capfd.readouterr().err

    return run


@pytest.mark.parametrize("kind", ["weights: one missing", "config: list", "template: broken", "shards: one gone"])
@pytest.mark.parametrize("command", [("plan",), ("run", "-q"), ("chat",)])
def test_every_command_refuses_before_anything_is_computed(
    folder: Path, run_refused_command: Callable[..., str], command: tuple[str, ...], kind: str
) -> None:
    damage, expected = DAMAGES[kind]
    damage(folder)
    error = run_refused_command(*command, str(folder) if command == ("chat",) else f"model.path={folder}")
    assert len(error.splitlines()) == 1
    assert re.search(expected, error)
    assert not list(folder.parent.rglob("summary.json"))


def test_the_context_is_checked_at_plan(folder: Path, run_refused_command: Callable[..., str]) -> None:
    assert run_refused_command("plan", f"model.path={folder}", "sft.max_completion_tokens=250") == (
        "data.max_prompt_tokens: found 64 beside max_completion_tokens 250 of SFT; expected at most 256 together, the "
        "model's context; lower one of them\n"
    )


@pytest.mark.parametrize("place", ["config", "tokenizer", "known"])
def test_no_code_of_a_folder_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Neither asked for on standard input nor run: a model that needs its own code is refused."""
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').write('x')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    damage, _ = DAMAGES["tokenizer config: own code" if place == "tokenizer" else "config: own code"]
    damage(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if place == "known":  # transformers has the architecture itself
        keys(CONFIG, model_type="llama")(folder)
        ModelLoader(CPU).load_policy(folder)
    else:
        with pytest.raises(InputError):
            ModelLoader(CPU).load_policy(folder)
        with pytest.raises(ValueError, match=r"of its own|custom code"):
            Pretrained(path=str(folder))
    assert not marker.exists()


def test_weights_that_are_not_numbers_are_refused(folder: Path) -> None:
    weights(lambda t: t[UP][3].fill_(float("nan")))(folder)
    with pytest.raises(InputError, match=f"found infinite or undefined numbers in {UP}"):
        ModelLoader(CPU).load_policy(folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        KeyboardInterrupt(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_no_damage(good: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "compute_reference_outputs", fail)
    with pytest.raises(type(error)) as raised:
        ModelLoader(CPU).load_policy(good)
    assert raised.value is error


def test_a_pad_token_that_is_counted_from_the_end_is_taken(folder: Path) -> None:
    keys(CONFIG, pad_token_id=-1)(folder)
    ModelLoader(CPU).load_policy(folder)


@pytest.mark.parametrize("path", ["weights", "./weights"])
def test_a_file_for_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").write_text("")
    with pytest.raises(ValidationError, match=rf"model.path: found no folder '{path}'; expected a model folder"):
        Pretrained(path=path)


def test_no_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    failed = run_mixpo(capsys, "chat", str(tmp_path / "none"))
    assert (failed.code, failed.err.count("\n")) == (2, 1)
    assert failed.err.startswith(f"{tmp_path / 'none'}: found a model that cannot be read (FileNotFoundError: ")


def test_what_is_read_of_a_folder_may_be_changed_by_who_reads_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is checked once, but no config or tokenizer of that is handed out again."""
    widths = []

    def change(checked: ModelFolder) -> None:
        widths.append(checked.config.hidden_size)
        checked.config.hidden_size = 7

    monkeypatch.setattr(pretrained, "load_weights", change)
    for _ in range(2):
        Pretrained(path=str(good), dtype="bfloat16")._load_source_model(good)
    assert widths == [32, 32]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_not_finite_are_not_saved(good: Path, tmp_path: Path, dtype: str) -> None:
    """In float16 all above 65504 is infinite."""
    lm = ModelLoader(CPU).load_policy(good)
    lm.dtype = getattr(torch, dtype)
    with torch.no_grad():
        lm.model.get_parameter(UP)[3, 4] = 1e5
    where = f"saved: found infinite or undefined numbers in {UP}; expected finite weights; the training diverged: lower"
    if dtype == "float16":
        with pytest.raises(InputError, match=rf"{where} the learning rate, or save .* by model.dtype=bfloat16"):
            save_model(lm, tmp_path / "saved")
    else:
        save_model(lm, tmp_path / "finite")
        with torch.no_grad():
            lm.model.get_parameter(UP)[3, 4] = float("nan")
        with pytest.raises(InputError, match=where):
            save_model(lm, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_the_architecture_keeps_in_float32_is_saved_so(good: Path, tmp_path: Path) -> None:
    lm = ModelLoader(CPU).load_policy(good)
    lm.dtype = torch.bfloat16
    lm.model._keep_in_fp32_modules, lm.model._keep_in_fp32_modules_strict = ["input_layernorm"], {"up_proj"}
    save_model(lm, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / TENSORS)
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in tensors if "input_layernorm" in name or "up_proj" in name}
    assert {tensors[name].dtype for name in tensors.keys() - wide} == {torch.bfloat16}


def test_end_tokens_are_those_that_the_folders_files_name(folder: Path) -> None:
    end = ModelLoader(CPU).load_policy(folder).end_token
    keys(GENERATION, eos_token_id=[end, 7])(folder)
    assert ModelLoader(CPU).load_policy(folder).end_tokens == {end, 7}
    removed(GENERATION)(folder)
    keys(CONFIG, eos_token_id=[end, 9])(folder)
    assert ModelLoader(CPU).load_policy(folder).end_tokens == {end, 9}


def test_end_tokens_that_no_file_names_are_not_guessed(tmp_path: Path) -> None:
    """Whatever transformers has made of an architecture's defaults."""
    folder = make_family("gpt2", tmp_path / "model")
    removed(GENERATION)(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = 50256
    with pytest.raises(InputError, match="found eos_token_id 50256"):
        read_end_tokens(model, folder)
    edited(CONFIG, lambda content: content.pop("eos_token_id"))(folder)
    assert read_end_tokens(model, folder) == frozenset()
    lm = ModelLoader(CPU).load_policy(folder)
    assert lm.end_tokens == {lm.end_token}


def test_a_published_generation_config_is_kept_though_transformers_would_refuse_it(
    folder: Path, tmp_path: Path
) -> None:
    """`temperature` without `do_sample`."""
    end = ModelLoader(CPU).load_policy(folder).end_token
    keys(GENERATION, temperature=0.6, eos_token_id=7)(folder)
    assert "do_sample" not in json.loads((folder / GENERATION).read_text())
    save_model(ModelLoader(CPU).load_policy(folder), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / GENERATION).read_text())
    assert (saved["temperature"], saved["eos_token_id"]) == (0.6, [end, 7])


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"normalized": True}], ids=str)
def test_tokenizers_whose_added_tokens_are_found_otherwise_are_not_the_same(
    untied: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    """But for the pad token, which no text is meant to hold."""
    came = Path(shutil.copytree(untied, tmp_path / "came"))

    def flag(content: dict[str, Any]) -> None:
        (unknown,) = [token for token in content["added_tokens"] if token["content"] == "<unk>"]
        assert not any(unknown[name] for name in flags)
        unknown.update(flags)

    edited(TOKENIZER, flag)(came)
    one, other = AutoTokenizer.from_pretrained(untied), AutoTokenizer.from_pretrained(came)
    assert "<unk>" not in (one.pad_token, other.pad_token)
    assert (compute_tokenization_digest(one) == compute_tokenization_digest(other)) == (not flags)


def test_old_buffers_and_the_head_of_a_tied_model_may_stand_beside_the_weights(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    weights(add)(folder)
    ModelLoader(CPU).load_policy(folder)


def test_weights_of_the_older_kind_are_read(folder: Path, good: Path) -> None:
    legacy(lambda tensors: tensors)(folder)
    one, other = ModelLoader(CPU).load_policy(folder), ModelLoader(CPU).load_policy(good)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def tensor_types(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["smollm2", "zephyr", "gpt2"])
def test_a_model_is_saved_in_the_type_it_came_in(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    came = make_family(name, tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(came)
    model.to(dtype).save_pretrained(came)
    size = (came / TENSORS).stat().st_size
    lm = ModelLoader(CPU).load_policy(came)
    before = [weight.clone() for weight in lm.parameters()]
    save_model(lm, tmp_path / "saved")
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}, "training goes on in float32"
    assert all(torch.equal(a, b) for a, b in zip(before, lm.parameters(), strict=True))
    assert tensor_types(tmp_path / "saved") == {dtype}
    assert (tmp_path / "saved" / TENSORS).stat().st_size == pytest.approx(size, rel=0.02)
    assert json.loads((tmp_path / "saved" / CONFIG).read_text())["dtype"] == str(dtype).removeprefix("torch.")
    first, again = load_file(came / TENSORS), load_file(tmp_path / "saved" / TENSORS)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert ModelLoader(CPU).load_policy(tmp_path / "saved").dtype == dtype


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_a_recipe_may_choose_the_type(good: Path, tmp_path: Path, asked: str) -> None:
    folder = StageCache(tmp_path, Runtime(threads=1)).compute_with_inputs(Pretrained(path=str(good), dtype=asked))
    assert tensor_types(locate_model_folder(folder)) == {torch.bfloat16 if asked == "bfloat16" else torch.float32}
    plain = Pretrained(path=str(good))
    assert (StageCache(tmp_path, Runtime(threads=1)).locate_folder(plain) == folder) == (asked == "auto")


def test_a_saved_bfloat16_reward_model_gives_its_scores_to_rounding(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    lm = ModelLoader(CPU).initialize_reward_model(folder, seed=1)
    batch = pack_branches([[5, 6, 7]], [[[8, 9], [10, 11, lm.end_token]]])
    with torch.no_grad():
        lm.score_head.weight.mul_(30)
        ours = lm(batch, "scores")
    save_model(lm, tmp_path / "saved")
    assert tensor_types(tmp_path / "saved") == {torch.bfloat16}
    with torch.no_grad():
        again = ModelLoader(CPU).load_reward_model(tmp_path / "saved")(batch, "scores")
    torch.testing.assert_close(again, ours, rtol=0.02, atol=0.02)


PADS: dict[str, dict[str, Any]] = {
    "its end token": {"pad_token": "</s>"},
    "none": {"pad_token": None},
    "of its own": {"pad_token": "<unk>"},
    "nothing but an end": {"pad_token": None, "unk_token": None, "bos_token": None},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("pad", PADS)
def test_a_batch_through_plain_transformers_gives_our_scores(
    untied: Path, tmp_path: Path, pad: str, lora: bool, side: str
) -> None:
    came = Path(shutil.copytree(untied, tmp_path / "came"))
    keys(TOKENS, **PADS[pad])(came)
    (came / "special_tokens_map.json").unlink(missing_ok=True)
    if pad == "nothing but an end":
        added = json.loads((came / TOKENIZER).read_text())["added_tokens"]
        keys(TOKENIZER, added_tokens=[token for token in added if token["content"] == "</s>"])(came)
    keys(CONFIG, pad_token_id=2 if pad == "its end token" else None)(came)

    lm = ModelLoader(CPU).initialize_reward_model(came, seed=0, lora=LoraSettings(rank=2) if lora else None)
    with torch.no_grad():
        lm.score_head.weight.mul_(20)
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    end = lm.end_token
    prompts, completions = [[1, 9, 30, 31], [1, 40]], [[[50, 60, end], [70]], [[80, 81, 82, 83, end], [90, 91]]]
    with torch.no_grad():
        ours = lm(pack_branches(prompts, completions), "scores").flatten()
    save_model(lm, tmp_path / "saved")
    if lora:
        export_model(tmp_path / "saved", tmp_path / "merged")
        shutil.rmtree(tmp_path / "saved")
        (tmp_path / "merged").rename(tmp_path / "saved")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    sequences = [prompt + one for row, prompt in enumerate(prompts) for one in completions[row]]
    batch = tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).logits[:, 0]
        batched = torch.cat([model(input_ids=torch.tensor([one])).logits[:, 0] for one in sequences])
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batched, ours, rtol=1e-4, atol=1e-4)
    assert model.config.pad_token_id == tokenizer.pad_token_id not in (None, end)
    assert model.config.num_labels == 1
    policy = ModelLoader(CPU).load_policy(came)
    again = ModelLoader(CPU).load_reward_model(tmp_path / "saved")
    assert again.tokenization_digest == policy.tokenization_digest
    one, other = (
        lm.tokenizer("The cat</s> <|reward_padding|> sleeps", split_special_tokens=True) for lm in (again, policy)
    )
    assert one["input_ids"] == other["input_ids"]


def test_a_classifier_is_no_policy_and_a_policy_no_reward_model(good: Path, tmp_path: Path) -> None:
    save_model(ModelLoader(CPU).initialize_reward_model(good, seed=0), tmp_path / "reward")
    with pytest.raises(InputError, match="expected a causal language model"):
        ModelLoader(CPU).load_policy(tmp_path / "reward")
    with pytest.raises(InputError, match="expected a reward model: a sequence classifier with one label"):
        ModelLoader(CPU).load_reward_model(good)


def test_the_embedding_of_the_pad_token_learns(untied: Path) -> None:
    """Transformers' embeddings give their pad token no gradient, and here the pad token ends every turn."""
    lm = ModelLoader(CPU).load_trainable_policy(untied)
    assert lm.model.config.pad_token_id == lm.end_token
    lm(pack_branches([[5, lm.end_token, 7]], [[[8, 9]]]), "logprobs").sum().backward()
    assert lm.model.get_input_embeddings().weight.grad[lm.end_token].abs().sum() > 0
