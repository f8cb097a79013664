"""LoRA: what is trained, what stays as it was, in which precision it is held, and what is written in the end."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixpo.data.branches import pack_branches
from mixpo.data.errors import InputError
from mixpo.models import loading
from mixpo.models.adapter_folders import WEIGHTS, holds_adapters, read_adapter_folder
from mixpo.models.adapters import LoraSettings, add_lora, iterate_adapter_weights, join_adapters
from mixpo.models.exporting import export_model
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.sampling import sample_completions
from mixpo.models.saving import save_model
from mixpo.models.weight_types import compute_in_float32, freeze_network
from mixpo.stages.reward_model import RewardModel
from mixpo.stages.stage import Stage
from mixpo.training import checkpoint
from mixpo.training.job import CHECKPOINT, StageJob, locate_model_folder
from mixpo.training.record import read_metrics
from mixpo.training.runtime import Runtime
from models import ARCHITECTURES, assert_plain_logprobs
from models import tiny as tiny_model
from worlds import SHORT, TinyWorld

CPU = torch.device("cpu")
PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
COMPLETIONS = [[[30, 31, 32, 5], [40, 5]], [[0, 7, 5], [41, 42, 43]], [[50], [51, 52, 53, 5]]]
LORA = LoraSettings(rank=3, alpha=7.0)


def randomize_trained_weights(lm: LanguageModel, seed: int = 3) -> None:
    """Else the adapters change nothing: one of their two factors starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def in_bfloat16(name: str, *, adapted: bool, narrow: bool) -> LanguageModel:
    """Frozen, held narrow or in float32; or adapted by adapters that change something."""
    lm = tiny_model(name)
    lm.network.precision = "bfloat16"
    lm.network.requires_grad_(False)
    if narrow:
        freeze_network(lm.network)
    if adapted:
        add_lora(lm, LoraSettings(rank=2))
        randomize_trained_weights(lm)
    assert all(parameter.requires_grad == ("lora_" in key) for key, parameter in lm.named_parameters())
    return lm


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_held_in_bfloat16_computes_what_autocast_does(name: str, adapted: bool) -> None:
    """Bit for bit: autocast rounds a float32 matrix to the same bfloat16 one at every product."""
    narrow, wide = (in_bfloat16(name, adapted=adapted, narrow=narrow) for narrow in (True, False))
    frozen = {key: p for key, p in narrow.model.named_parameters() if not p.requires_grad}
    assert {p.dtype for key, p in frozen.items() if "proj" in key and "weight" in key} <= {torch.bfloat16}
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}
    assert narrow.model.get_input_embeddings().weight.dtype == torch.float32
    assert narrow.model.get_output_embeddings().weight.dtype == torch.bfloat16
    narrowed = sum(p.numel() for p in frozen.values() if p.dtype == torch.bfloat16)
    assert narrowed > 0.6 * sum(p.numel() for p in frozen.values())
    batch = pack_branches(PROMPTS, COMPLETIONS)
    results = []
    for lm in (narrow, wide):
        lm.train()
        logprobs, entropies = lm(batch, "logprobs", "entropies")
        if adapted:
            logprobs.sum().backward()
        gradients = [p.grad for p in lm.parameters() if p.grad is not None]
        assert bool(gradients) == adapted
        sampled = sample_completions(lm, PROMPTS, k=2, max_tokens=6, seed=0)
        results.append((logprobs, entropies, lm(batch, "states"), *gradients, sampled.tokens, sampled.logprobs))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_in_bfloat16_is_held_so_and_computes_what_its_values_in_float32_do(
    tiny: TinyWorld, tmp_path: Path, tied: bool
) -> None:
    base = locate_model_folder(tiny.build(tiny.base))
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=tied).to(torch.bfloat16)
    tokenizer, lms = AutoTokenizer.from_pretrained(base), []
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        tokenizer.save_pretrained(tmp_path / str(dtype))
        lms.append(ModelLoader(CPU).load_policy(tmp_path / str(dtype), "bfloat16"))
    held = {name: p.dtype for name, p in lms[0].model.named_parameters()}
    assert {dtype for name, dtype in held.items() if "norm" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in held.items() if "norm" in name} == {torch.float32}
    assert any("lm_head" in name for name in held) == (not tied)
    batch = pack_branches(PROMPTS, COMPLETIONS)
    for lm in lms:
        add_lora(lm, LORA)
        randomize_trained_weights(lm)
    results = [(lm(batch, "logprobs"), sample_completions(lm, PROMPTS, k=2, max_tokens=6, seed=0)) for lm in lms]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].logprobs, results[1][1].logprobs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_held_in_bfloat16_can_compute_in_float32_and_is_as_before_afterwards(name: str) -> None:
    lm = in_bfloat16(name, adapted=False, narrow=True)
    lm.network.precision = "float32"
    held = dict(lm.model.named_parameters())
    wide = tiny_model(name)
    own = {key for key, _ in wide.model.named_parameters()}  # a tied head is no weight of its own
    wide.model.load_state_dict({key: p.float() for key, p in held.items() if key in own}, strict=False)
    batch = pack_branches(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        with compute_in_float32(lm.model):
            torch.testing.assert_close(lm(batch, "states"), wide(batch, "states"), rtol=1e-5, atol=1e-5)
        assert {key: id(p) for key, p in lm.model.named_parameters()} == {key: id(p) for key, p in held.items()}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says which files are in memory")
def test_what_is_held_in_bfloat16_keeps_no_file_in_memory(tiny: TinyWorld) -> None:
    """One weight that is still read from the mapped file would keep all of its pages."""
    folder = locate_model_folder(tiny.build(tiny.policy))

    def is_mapped() -> bool:
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text(encoding="utf8")

    wide = ModelLoader(CPU).load_policy(folder)
    assert is_mapped(), "in float32 they are the file's own pages"
    del wide
    gc.collect()
    narrow = ModelLoader(CPU).load_policy(folder, "bfloat16")
    gc.collect()
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32, torch.bfloat16}
    assert not is_mapped()


def test_weights_that_came_in_bfloat16_stay_what_they_are_beside_one_in_float32() -> None:
    """And the head stays the embedding's weight, which a copy would hold twice."""
    network = tiny_model("llama").network
    model, network.precision = network.model.to(torch.bfloat16), "bfloat16"
    model.lm_head.weight = model.get_input_embeddings().weight
    model.model.layers[0].mlp.up_proj.float()
    came = {name: weight.data_ptr() for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}
    freeze_network(network)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {p.dtype for name, p in model.named_parameters() if p.ndim == 2} == {torch.bfloat16}
    assert all(p.data_ptr() == came[name] for name, p in model.named_parameters() if p.ndim == 2 and name in came)


def test_a_frozen_reward_model_keeps_its_head_in_float32(tiny: TinyWorld) -> None:
    policy, batch = locate_model_folder(tiny.build(tiny.policy)), pack_branches(PROMPTS, COMPLETIONS)
    wide, narrow = (ModelLoader(CPU).initialize_reward_model(policy, seed=0, precision="bfloat16") for _ in range(2))
    freeze_network(narrow.network)
    assert narrow.model.score.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(narrow(batch, "scores"), wide(batch, "scores"))


def test_in_float32_nothing_is_narrowed() -> None:
    lm = tiny_model("llama")
    freeze_network(lm.network)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in lm.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_adapters_are_saved_alone_and_merged_on_request(
    tiny: TinyWorld, tmp_path: Path, kind: str, precision: Any
) -> None:
    """Against W + (alpha / rank) B A in float64; the base is not the rounded one that bfloat16 computes with."""
    source = locate_model_folder(tiny.build(tiny.policy))
    if kind == "policy":
        lm = ModelLoader(CPU).load_policy(source, precision)
        plain = lm(pack_branches(PROMPTS, COMPLETIONS), "states")
        add_lora(lm, LORA)
    else:
        lm = ModelLoader(CPU).initialize_reward_model(source, seed=0, precision=precision, lora=LORA)
        plain = ModelLoader(CPU).load_policy(source, precision)(pack_branches(PROMPTS, COMPLETIONS), "states")
    batch = pack_branches(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        assert torch.equal(lm(batch, "states"), plain), "it starts as the model that it adapts"
        randomize_trained_weights(lm)
        trained = dict(lm.named_parameters())
        before = lm(batch, "states")
        assert not torch.equal(before, plain)
        digest = save_model(lm, tmp_path / "saved")
        assert torch.equal(lm(batch, "states"), before), "and it can be trained further"
        assert not list((tmp_path / "saved").glob("model*")), "without the base's weights"
        modes = {file.name: file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
        assert len(set(modes.values())) == 1, "a shared cache is read by others"
        loader = ModelLoader(CPU)
        load = loader.load_reward_model if kind == "reward" else loader.load_policy
        again = load(tmp_path / "saved", precision)
        tolerance = 1e-5 if precision == "float32" else 0.05
        torch.testing.assert_close(again(batch, "states"), before, rtol=tolerance, atol=tolerance)
        assert save_model(again, tmp_path / "again") == digest
    export_model(tmp_path / "saved", tmp_path / "whole")
    base, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == base.keys() | ({"score.weight"} if kind == "reward" else set())
    name_of_adapter = lm.adapters[-1]
    for name, weight in base.items():
        expected, path = weight.double(), f"model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.{name_of_adapter}.weight" in trained:
            down, up = (trained[f"{path}.lora_{side}.{name_of_adapter}.weight"].detach().double() for side in "AB")
            expected = expected + 7.0 / 3 * up @ down
            assert not torch.equal(saved[name], weight)
        torch.testing.assert_close(saved[name].double(), expected, rtol=0, atol=1e-6)
    if kind == "reward":
        assert torch.equal(saved["score.weight"], trained["heads.trained-value.weight"])
    with pytest.raises(InputError, match=r"whole: found something there; expected a new or an empty folder"):
        export_model(tmp_path / "saved", tmp_path / "whole")
    with pytest.raises(InputError, match=r"^/dev/null/model: cannot be written \(Not a directory\); choose another"):
        export_model(tmp_path / "saved", Path("/dev/null/model"))


@pytest.mark.parametrize("targets", [("all-linear", ("q_proj",)), (("up_proj", "v_proj"), "all-linear")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_chain_is_one_adapter_of_the_summed_rank_that_peft_loads(
    tiny: TinyWorld, tmp_path: Path, name: str, targets: Any
) -> None:
    """Against peft's own reading of the last folder, and plain weights of the exported one; scales and ranks differ."""
    base = tmp_path / "base"
    model = tiny_model(name).model
    model.set_attn_implementation("sdpa")
    model.resize_token_embeddings(len(tiny_tokenizer(tiny)))
    model.save_pretrained(base)
    tiny_tokenizer(tiny).save_pretrained(base)
    if name == "gpt2":
        targets = [target if target == "all-linear" else ("c_attn",) for target in targets]
    folder = base
    for step, target in enumerate(targets):
        lora = LoraSettings(rank=2 + step, alpha=5.0, rank_stabilized=step == 1, target_modules=target)
        lm = ModelLoader(CPU).load_trainable_policy(folder, lora=lora)
        randomize_trained_weights(lm, seed=step)
        folder = tmp_path / str(step)
        save_model(lm, folder)
    adapters = read_adapter_folder(folder)
    assert adapters.base == base
    ranks = {len(weight) for name, weight in adapters.weights.items() if name.endswith("lora_A")}
    assert 5 in ranks
    assert len(ranks) == 2, "layers that one stage adapts have its rank"
    with torch.no_grad():
        expected = lm(pack_branches(PROMPTS, COMPLETIONS), "logprobs")
        again = ModelLoader(CPU).load_policy(folder)
        torch.testing.assert_close(again(pack_branches(PROMPTS, COMPLETIONS), "logprobs"), expected, rtol=0, atol=2e-5)
    peft = AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model()
    export_model(folder, tmp_path / "whole")
    for plain in (peft, AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        assert_plain_logprobs(plain, PROMPTS, COMPLETIONS, expected, 2e-5)


def tiny_tokenizer(tiny: TinyWorld) -> Any:
    return AutoTokenizer.from_pretrained(locate_model_folder(tiny.build(tiny.base)))


def test_a_reward_models_adapters_score_in_peft_as_here(tiny: TinyWorld, tmp_path: Path) -> None:
    lm = ModelLoader(CPU).initialize_reward_model(locate_model_folder(tiny.build(tiny.base)), seed=1, lora=LORA)
    randomize_trained_weights(lm)
    save_model(lm, tmp_path / "saved")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)
    with torch.no_grad():
        scores = lm(pack_branches(PROMPTS, COMPLETIONS), "scores")
        plain = [
            [float(model(torch.tensor([p + c])).logits) for c in row]
            for p, row in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        again = ModelLoader(CPU).load_reward_model(tmp_path / "saved")(pack_branches(PROMPTS, COMPLETIONS), "scores")
    torch.testing.assert_close(scores, torch.tensor(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, scores, rtol=1e-5, atol=1e-5)


def test_modules_train_whole_and_are_saved_with_the_adapters(tiny: TinyWorld, tmp_path: Path) -> None:
    """A second stage goes on with the first one's, also where it trains other modules whole."""
    folder = locate_model_folder(tiny.build(tiny.policy))
    norms = {}
    for step, saved in enumerate((("model.norm",), ("model.norm", "0.input_layernorm"))):
        lm = ModelLoader(CPU).load_trainable_policy(folder, lora=LoraSettings(rank=2, modules_to_save=saved))
        own = dict(lm.named_parameters())["model.model.norm.modules_to_save.trained.weight"]
        assert own.requires_grad
        if step:
            assert torch.equal(own, norms[0])
        randomize_trained_weights(lm, seed=step)
        norms[step] = own.detach().clone()
        folder = tmp_path / str(step)
        save_model(lm, folder)
    with torch.no_grad():
        expected = lm(pack_branches(PROMPTS, COMPLETIONS), "logprobs")
    again = ModelLoader(CPU).load_policy(folder)
    torch.testing.assert_close(again(pack_branches(PROMPTS, COMPLETIONS), "logprobs"), expected)
    export_model(folder, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert torch.equal(whole["model.norm.weight"], norms[1])
    peft = AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model()
    assert_plain_logprobs(peft, PROMPTS, COMPLETIONS, expected, 2e-5)
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found 'lm_head', whose weights are also those of"):
        add_lora(again, LoraSettings(modules_to_save=("lm_head",)))
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found 'norms'; expected modules of the model"):
        add_lora(again, LoraSettings(modules_to_save=("norms",)))


@pytest.fixture(scope="module")
def untied(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    source = locate_model_folder(tiny.build(tiny.base))
    config = AutoConfig.from_pretrained(source, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saved", [("q_proj",), ("0.mlp",), ("lm_head", "embed_tokens")])
@pytest.mark.parametrize("again", [True, False])
def test_matrices_train_whole_and_are_not_adapted(
    untied: Path, tmp_path: Path, saved: tuple[str, ...], again: bool
) -> None:
    """A second stage trains them whole again, or leaves them; a reward model, full or not, starts from them."""
    lm = ModelLoader(CPU).load_trainable_policy(untied, lora=LoraSettings(rank=2, modules_to_save=saved))
    randomize_trained_weights(lm, seed=1)
    save_model(lm, tmp_path / "first")
    lora = LoraSettings(rank=2, modules_to_save=saved if again else ())
    lm = ModelLoader(CPU).load_trainable_policy(tmp_path / "first", lora=lora)
    randomize_trained_weights(lm, seed=2)
    save_model(lm, tmp_path / "second")
    batch = pack_branches(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        expected = lm(batch, "logprobs")
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second").get_base_model()
    assert_plain_logprobs(peft, PROMPTS, COMPLETIONS, expected, 1e-4)
    read = ModelLoader(CPU).load_policy(tmp_path / "second")(batch, "logprobs")
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    export_model(tmp_path / "second", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert_plain_logprobs(whole, PROMPTS, COMPLETIONS, expected, 1e-4)

    files = [untied / "model.safetensors", *(tmp_path / name / WEIGHTS for name in ("first", "second"))]
    initial, first, second = (load_file(file) for file in files)
    own = [name for name in initial if any(f".{part}." in f".{name}" for part in saved)]
    assert own
    for name in own:
        assert torch.equal(second[f"base_model.model.{name}"], first[f"base_model.model.{name}"]) != again
        assert not any(name.removesuffix("weight") + "lora" in adapted for adapted in {**first, **second})
    matrices = sum(weight.numel() for name, weight in initial.items() if "norm" not in name and "embed" not in name)
    trained = sum(initial[name].numel() for name in own if again and "embed" not in name)
    adapters = sum(weight.numel() for name, weight in lm.named_parameters() if ".lora_" in name)
    assert sum(lm.count_multiplied_weights()) == matrices + adapters
    assert lm.count_multiplied_weights()[0] == trained + sum(
        weight.numel() for name, weight in lm.named_parameters() if ".lora_" in name and ".trained." in name
    )

    scores = []
    for settings in (None, lora):
        reward = ModelLoader(CPU).initialize_reward_model(tmp_path / "second", seed=1, lora=settings)
        scores.append(reward(batch, "scores").detach())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    save_model(reward, tmp_path / "reward")
    peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    with torch.no_grad():
        theirs = float(peft(torch.tensor([PROMPTS[0] + COMPLETIONS[0][0]])).logits)
    assert theirs == pytest.approx(float(scores[0][0, 0]), abs=1e-4)


def test_a_module_trains_whole_or_is_adapted(untied: Path, tmp_path: Path) -> None:
    lm = ModelLoader(CPU).load_trainable_policy(untied, lora=LoraSettings(rank=2))
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found 'model.layers.0.mlp.down_proj', to which an "):
        add_lora(lm, LoraSettings(modules_to_save=("mlp",)), "other")
    save_model(lm, tmp_path / "adapted")
    lm = ModelLoader(CPU).load_trainable_policy(untied, lora=LoraSettings(rank=2, modules_to_save=("q_proj",)))
    save_model(lm, tmp_path / "whole")
    for first, second in (("adapted", "whole"), ("whole", "adapted")):
        loader = ModelLoader(CPU)
        held = loader.load_policy(tmp_path / first)
        with pytest.raises(InputError, match=r"of two stages' models on one base, .*q_proj trains whole in one"):
            loader.load_policy(tmp_path / second)
        assert len(held.adapters) == 1
    for settings in ({"modules_to_save": ("q_proj",)}, {}):
        with pytest.raises(InputError, match=r"^lora.target_modules: found 'q_proj'; expected layers .*: down_proj, "):
            add_lora(lm, LoraSettings(target_modules=("q_proj",), **settings), "other")
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found 'lm_head' and all others; expected some "):
        ModelLoader(CPU).load_trainable_policy(untied, lora=LoraSettings(modules_to_save=("model", "lm_head")))


def stage_of(tiny: TinyWorld, kind: str, precision: str = "float32", **settings: Any) -> Stage:
    name, _, init = kind.partition("-")
    common = {"lora": {"rank": 4}, "precision": precision, **({"value_init": init} if init else {}), **settings}
    stage: Stage = getattr(tiny, name)(**common)
    return stage


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[LanguageModel, dict[str, torch.Tensor]]]]:
    """Every model that got adapters, with its weights as they were then."""
    adapted_models: list[tuple[LanguageModel, dict[str, torch.Tensor]]] = []

    def adapting(lm: LanguageModel, lora: LoraSettings, name: str = "trained") -> None:
        add_lora(lm, lora, name)
        adapted_models.append((lm, {name: p.detach().clone() for name, p in lm.named_parameters()}))

    monkeypatch.setattr(loading, "add_lora", adapting)
    return adapted_models


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "float32") for kind in ("sft", "reward", "dpo", "ppo", "ppo-policy", "ppo-shared")),
        ("dpo", "bfloat16"),
        ("ppo", "bfloat16"),
    ],
)
def test_every_trained_model_learns_by_adapters_and_its_scalar_head_alone(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: list[Any], kind: str, precision: str
) -> None:
    stage = stage_of(tiny, kind, precision)
    folders = {name: tiny.build(source) for name, source in stage.get_input_stages().items()}
    monkeypatch.setattr(StageJob, "finish_stage", lambda self, **figures: None)
    tiny.compute(stage, tmp_path, Runtime(threads=1, checkpoint_minutes=0))
    assert len(adapted) == (2 if kind in ("ppo", "ppo-policy") else 1)
    for lm, before in adapted:
        after = dict(lm.named_parameters())
        trained = {name for name, p in after.items() if p.requires_grad}
        expected = {name for name in after if ".lora_" in name or name.startswith("heads.")}
        assert trained == expected
        assert any(".lora_" in name for name in trained)
        for name, weight in before.items():
            if name not in trained:
                assert torch.equal(after[name], weight), f"{name} is frozen"
            elif ".lora_B" in name or name.startswith("heads."):
                assert not torch.equal(after[name], weight), f"{name} learns"
            assert after[name].dtype == torch.float32 or (precision == "bfloat16" and name not in trained)
    tensors = load_file(tmp_path / CHECKPOINT)
    content = json.loads(tensors.pop("json").numpy().tobytes())
    parts = checkpoint._insert_tensors(content["state"], tensors)["parts"]
    saved_names = {name for part in ("model", "policy", "value") for name in parts.get(part, ())}
    assert saved_names == {name for lm, _ in adapted for name, p in lm.named_parameters() if p.requires_grad}
    saved = read_adapter_folder(locate_model_folder(tmp_path))
    assert saved.base == locate_model_folder(folders["base" if kind == "sft" else "policy"]).resolve()
    assert all("proj.lora_" in name for name in saved.weights), "embeddings and norms are as they were"
    assert (saved.head is not None) == (kind == "reward")


@pytest.mark.parametrize(("kind", "least"), [("sft", 0.005), ("reward", 0.03), ("dpo", 0.03)])
def test_the_loss_falls(tiny: TinyWorld, kind: str, least: float) -> None:
    """From the first epoch to the last; SFT's start is random embeddings, which stay as they are."""
    start = {"base": tiny.policy} if kind == "sft" else {}
    out = tiny.run(stage_of(tiny, kind, epochs=8, learning_rate=0.01, **start))
    losses = [row["loss"] for row in read_metrics(out)]
    part = len(losses) // 8
    assert sum(losses[-part:]) < (1 - least) * sum(losses[:part])


def test_dropout_acts_while_learning_alone() -> None:
    torch.manual_seed(0)
    lm, batch = tiny_model("llama"), pack_branches(PROMPTS, COMPLETIONS)
    add_lora(lm, LoraSettings(rank=2, dropout=0.5))
    randomize_trained_weights(lm)
    lm.train()
    assert not torch.equal(lm(batch, "logprobs"), lm(batch, "logprobs"))
    lm.eval()
    assert torch.equal(lm(batch, "logprobs"), lm(batch, "logprobs"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_joined_adapters_compute_what_one_after_the_other_does(name: str) -> None:
    """With ranks and scales of their own; of all layers, one has the first adapter alone."""
    lm = tiny_model(name)
    before = lm(batch := pack_branches(PROMPTS, COMPLETIONS), "states")
    add_lora(lm, LoraSettings(rank=3, alpha=12.0), "first")
    randomize_trained_weights(lm)
    layer = next(layer for layer, _ in iterate_adapter_weights(lm.network, "first")).rsplit(".", 1)[0]
    others = {name.rsplit(".", 1)[0] for name, _ in iterate_adapter_weights(lm.network, "first")} - {layer}
    add_lora(lm, LoraSettings(rank=2, alpha=1.0, rank_stabilized=True, target_modules=tuple(sorted(others))), "second")
    randomize_trained_weights(lm)
    apart = lm(batch, "states")
    with torch.no_grad(), join_adapters(lm.network, lm.adapters):
        joined = lm(batch, "states")
    torch.testing.assert_close(joined, apart.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), join_adapters(lm.network, lm.adapters[:1]):
        first = lm(batch, "states")
    differences = [(one - other).abs().max() for one, other in ((apart, before), (apart, first), (first, before))]
    assert min(differences) > 1e-2
    with pytest.raises(RuntimeError, match="stop"), join_adapters(lm.network, lm.adapters):
        raise RuntimeError("stop")
    assert torch.equal(lm(batch, "states"), apart), "peft computes again"


def test_adapters_stand_where_they_are_asked_for_and_scale_with_the_root_of_the_rank() -> None:
    lm = tiny_model("llama")
    lm.network.requires_grad_(False)
    add_lora(lm, LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj", "mlp.up_proj"), rank_stabilized=True))
    adapted = {name.split(".lora_")[0] for name, p in lm.model.named_parameters() if p.requires_grad}
    assert {name.partition("layers.")[2][2:] for name in adapted} == {"self_attn.q_proj", "mlp.up_proj"}
    randomize_trained_weights(lm)
    layer = lm.model.get_submodule(next(name for name in adapted if "q_proj" in name))
    product = layer.lora_B["trained"].weight @ layer.lora_A["trained"].weight
    torch.testing.assert_close(layer.get_delta_weight("trained"), 8.0 / 4**0.5 * product)
    with pytest.raises(
        InputError, match=r"^lora.target_modules: found 'c_attn'; expected layers of the model: down_proj"
    ):
        add_lora(tiny_model("llama"), LoraSettings(target_modules=("q_proj", "c_attn")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_models_on_one_network_compute_as_if_each_had_its_own(tiny: TinyWorld, tmp_path: Path, precision: Any) -> None:
    """Policy, reference, reward and value model, in any order, with a gradient in what trains and nowhere else."""
    base, batch = locate_model_folder(tiny.build(tiny.policy)), pack_branches(PROMPTS, COMPLETIONS)
    first = ModelLoader(CPU).load_trainable_policy(base, lora=LORA)
    reward = ModelLoader(CPU).initialize_reward_model(base, seed=0, lora=LORA)
    for number, lm in enumerate((first, reward)):
        randomize_trained_weights(lm, seed=number)
        save_model(lm, tmp_path / str(number))

    def load_all(loaders: list[ModelLoader]) -> dict[str, LanguageModel]:
        one, other, third, fourth = loaders
        torch.manual_seed(0)
        models = {"policy": one.load_trainable_policy(tmp_path / "0", precision, LoraSettings(rank=2))}
        models |= {"reference": other.load_policy(tmp_path / "0", precision)}
        torch.manual_seed(1)
        models |= {"value": third.load_value_model(tmp_path / "1", precision, LoraSettings(rank=2))}
        models |= {
            "reward": fourth.load_reward_model(tmp_path / "1", precision),
            "sft": other.load_policy(base, precision),
        }
        for number, name in enumerate(("policy", "value")):
            randomize_trained_weights(models[name], seed=10 + number)
        return models

    shared = load_all([ModelLoader(CPU)] * 4)
    separate = load_all([ModelLoader(CPU) for _ in range(4)])
    assert len({id(lm.network) for lm in shared.values()}) == 1
    assert len({id(lm.network) for lm in separate.values()}) == 4
    outputs = {"policy": "logprobs", "reference": "logprobs", "value": "values", "reward": "scores", "sft": "logprobs"}
    for name, output in [*outputs.items(), *reversed(outputs.items())]:
        one, other = (models[name](batch, output) for models in (shared, separate))
        assert torch.equal(one, other), name
        if name in ("policy", "value"):
            gradients = []
            for models, computed in ((shared, one), (separate, other)):
                trained = [p for p in models[name].parameters() if p.requires_grad]
                gradients.append(torch.autograd.grad(computed.sum(), trained))
            assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        else:
            assert not one.requires_grad
    distinct = [shared[name](batch, "states") for name in outputs]
    assert len({tuple(states.flatten().tolist()) for states in distinct}) == 5


def test_a_frozen_network_is_loaded_once_and_freed_with_its_last_model(
    tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = locate_model_folder(tiny.build(tiny.policy)), []
    wrap = loading.Network
    monkeypatch.setattr(loading, "Network", lambda *args, **how: made.append(0) or wrap(*args, **how))
    loader = ModelLoader(CPU)
    one, other = loader.load_policy(folder), loader.load_policy(folder)
    assert one.network is other.network
    assert len(made) == 1
    assert loader.load_trainable_policy(folder).network is not one.network, "what trains whole is a model of its own"
    del one, other
    loader.load_policy(folder)
    assert len(made) == 3


def test_a_whole_run_with_lora_is_adapters_on_one_base(tiny: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage against a model of merged weights; PPO holds one network."""
    lora = {"lora": {"rank": 2}}
    sft = tiny.sft(**lora)
    base = locate_model_folder(tiny.build(tiny.base)).resolve()
    dpo = tiny.dpo(policy=sft, reference=sft, **lora)
    scored = RewardModel(policy=sft, pairs=tiny.pairs.train_pairs, data=tiny.pairs, batch_size=16, **lora, **SHORT)
    made: list[Any] = []
    wrap = loading.Network
    tiny.build(dpo), tiny.build(scored)
    monkeypatch.setattr(loading, "Network", lambda *args, **how: made.append(0) or wrap(*args, **how))
    ppo = tiny.ppo(policy=dpo, reference=dpo, sft=sft, reward=scored, **lora)
    tiny.build(ppo)
    assert len(made) == 1, "policy, reference, SFT, reward and value model"
    rows = read_metrics(tiny.build(ppo))
    assert rows[0]["kl_abs_per_token"] < 1e-5, "it starts as the reference"
    assert rows[0]["kl_from_sft"] != rows[0]["kl"]
    for stage, rank in ((sft, 2), (dpo, 4), (ppo, 6), (scored, 4)):
        folder = locate_model_folder(tiny.build(stage))
        adapters = read_adapter_folder(folder)
        assert holds_adapters(folder)
        assert adapters.base == base
        assert {len(weight) for name, weight in adapters.weights.items() if name.endswith("lora_A")} == {rank}


def test_ppo_with_lora_is_the_same_on_adapters_as_on_merged_models(tiny: TinyWorld, tmp_path: Path) -> None:
    """Metrics of the first iterations, from a start that is adapters or the weights that they make."""
    sft = tiny.sft(lora={"rank": 2}, base=tiny.policy, epochs=2)
    whole = tmp_path / "whole"
    export_model(locate_model_folder(tiny.build(sft)), whole / "model")
    rows = []
    for start in (tiny.build(sft), whole):
        stage = tiny.ppo(lora={"rank": 2}, advantage="rloo", completions_per_prompt=2)
        folders = {name: tiny.build(source) for name, source in stage.get_input_stages().items()}
        out = tmp_path / start.name / "out"
        out.mkdir(parents=True)
        paths = stage.locate_inputs(folders) | {"policy": start, "reference": start, "sft": start}
        stage.compute(paths, StageJob(out, Runtime(threads=1)))
        rows.append(read_metrics(out)[0])
    same = {"score", "reward", "kl_from_sft", "completion_tokens", "policy_loss", "entropy", "grad_norm"}
    for name in same:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-5), name


def test_damaged_adapters_are_told(tiny: TinyWorld, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = locate_model_folder(tiny.build(tiny.policy))
    base.symlink_to(model)
    lm = ModelLoader(CPU).load_trainable_policy(base, lora=LORA)
    folder = tmp_path / "adapters"
    save_model(lm, folder)
    load = ModelLoader(CPU).load_policy
    load(folder)
    with pytest.raises(InputError, match="found adapters of a policy; expected those of a reward model"):
        ModelLoader(CPU).load_reward_model(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "q_proj.lora_B" in name)

    def damage(changed: dict[str, torch.Tensor]) -> None:
        kept = {key: value.contiguous() for key, value in {**weights, **changed}.items() if value.numel()}
        save_file(kept, file)

    file = folder / "adapter_model.safetensors"
    damage({name: torch.full_like(weights[name], torch.nan)})
    with pytest.raises(InputError, match=r"adapters: found infinite or undefined numbers in .*q_proj.lora_B"):
        load(folder)
    damage({name: weights[name][:, :2]})
    with pytest.raises(InputError, match=r"adapters that do not fit .*q_proj.lora_B \[32, 2\] \(not \[32, 3\]\)"):
        load(folder)
    damage({name: torch.empty(0)})
    with pytest.raises(InputError, match=r"adapters that do not fit .*no tensor .*q_proj.lora_B"):
        load(folder)
    damage({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(3, 32)})
    with pytest.raises(InputError, match=r"adapters that do not fit .*layers.7"):
        load(folder)
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match="adapters that cannot be read"):
        load(folder)
    damage({})
    entries = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps({**entries, "digest": "0" * 16}))
    with pytest.raises(InputError, match=f"for a model with digest {'0' * 16}, and .* with digest {entries['digest']}"):
        load(folder)
    (folder / "base.json").write_text(json.dumps({**entries, "path": "../nowhere"}))
    with pytest.raises(InputError, match=r"found no folder .*nowhere; expected the model that the adapters change"):
        load(folder)
    (folder / "base.json").unlink()
    with pytest.raises(InputError, match=r"found adapters without base.json; expected adapters that mixpo wrote"):
        load(folder)


def test_a_moved_cache_keeps_its_adapters(tiny: TinyWorld, tmp_path: Path) -> None:
    """The path to the base is relative, and the digest knows no place."""
    model = locate_model_folder(tiny.build(tiny.policy))
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        for file in model.iterdir():
            (tmp_path / place / "base").mkdir(exist_ok=True)
            (tmp_path / place / "base" / file.name).write_bytes(file.read_bytes())
    lm = ModelLoader(CPU).load_trainable_policy(tmp_path / "one" / "base", lora=LORA)
    digest = save_model(lm, tmp_path / "one" / "adapters")
    (tmp_path / "one" / "adapters").rename(tmp_path / "other" / "adapters")
    adapters = read_adapter_folder(tmp_path / "other" / "adapters")
    assert adapters.base == tmp_path / "other" / "base"
    lm.folder = tmp_path / "other" / "base"
    assert save_model(lm, tmp_path / "other" / "again") == digest


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Matrices of bitsandbytes have 64 columns or more."""
    return TinyWorld(tmp_path_factory.mktemp("wider"), width=64)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_base_in_four_bits_is_shared_and_its_adapters_are_those_of_the_whole_model(
    wider: TinyWorld, tmp_path: Path, precision: Any
) -> None:
    """Values of the base against bitsandbytes' own reading of what it quantized."""
    functional = pytest.importorskip("bitsandbytes").functional
    base, batch = locate_model_folder(wider.build(wider.policy)), pack_branches(PROMPTS, COMPLETIONS)
    lora, loader = LoraSettings(rank=2, quantize_base=True), ModelLoader(CPU)
    policy = loader.load_trainable_policy(base, precision, lora)
    reference = loader.load_policy(base, precision, quantize=True)
    assert reference.network is policy.network
    layer = policy.model.get_submodule("model.layers.0.mlp.up_proj").base_layer
    assert layer.weight.dtype == torch.uint8
    whole = ModelLoader(CPU).load_policy(base, precision)
    with torch.no_grad():
        for name, module in whole.model.named_modules():
            if name.endswith("_proj"):
                packed = policy.model.get_submodule(f"{name}.base_layer").weight
                module.weight.copy_(functional.dequantize_4bit(packed.data, packed.quant_state))
        tolerance = 1e-4 if precision == "float32" else 0.05
        expected = whole(batch, "logprobs")
        torch.testing.assert_close(reference(batch, "logprobs"), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(policy(batch, "logprobs"), reference(batch, "logprobs"))
    assert policy.count_multiplied_weights()[1] == sum(whole.count_multiplied_weights())
    randomize_trained_weights(policy)
    policy(batch, "logprobs").sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    save_model(policy, tmp_path / "saved")
    assert read_adapter_folder(tmp_path / "saved").base == base.resolve()
    on_whole = ModelLoader(CPU).load_policy(tmp_path / "saved", precision)
    assert on_whole.model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.dtype != torch.uint8


def test_every_stage_trains_on_a_base_in_four_bits(wider: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen models too: no network but those that were quantized is loaded."""
    pytest.importorskip("bitsandbytes")
    quantized: list[bool] = []
    load = loading.load_weights
    monkeypatch.setattr(
        loading, "load_weights", lambda *args, **how: quantized.append(how.get("quantize", False)) or load(*args, **how)
    )
    for kind in ("sft", "reward", "dpo", "ppo"):
        stage = getattr(wider, kind)(lora={"rank": 2, "quantize_base": True})
        inputs = [wider.build(source) for source in stage.get_input_stages().values()]
        quantized.clear()
        out = wider.run(stage)
        assert holds_adapters(locate_model_folder(out))
        assert inputs
        assert quantized == [True] * (2 if kind == "ppo" else 1), "PPO's policies and its reward models, once each"
    assert read_metrics(out)[0]["kl_abs_per_token"] < 1e-3, "the reference is held in four bits too"


def test_what_is_held_in_four_bits_does_not_train_whole(wider: TinyWorld) -> None:
    pytest.importorskip("bitsandbytes")
    folder = locate_model_folder(wider.build(wider.base))
    lora = LoraSettings(quantize_base=True, modules_to_save=("norm",))
    assert ModelLoader(CPU).load_trainable_policy(folder, lora=lora)
    with pytest.raises(InputError, match=r"^lora.modules_to_save: found 'model.layers.0.mlp.up_proj' beside lora.quan"):
        ModelLoader(CPU).load_trainable_policy(folder, lora=lora.model_copy(update={"modules_to_save": ("up_proj",)}))
