"""LoRA: what is trained, what stays as it was, in which precision it is held, and what is written in the end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixpo.data.branches import pack_branches
from mixpo.data.errors import InputError
from mixpo.models import adapters
from mixpo.models.adapters import LoraSettings, add_lora, freeze_model
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.sampling import sample_completions
from mixpo.models.saving import save_model
from mixpo.stages.stage import Stage
from mixpo.training import checkpoint
from mixpo.training.job import CHECKPOINT, StageJob, locate_model_folder
from mixpo.training.record import read_metrics
from mixpo.training.runtime import Runtime
from models import ARCHITECTURES
from models import tiny as tiny_model
from worlds import TinyWorld

CPU = torch.device("cpu")
PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
COMPLETIONS = [[[30, 31, 32, 5], [40, 5]], [[0, 7, 5], [41, 42, 43]], [[50], [51, 52, 53, 5]]]


def randomize_trained_weights(lm: LanguageModel) -> None:
    """Else the adapters change nothing: one of their two factors starts at 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def in_bfloat16(name: str, *, adapted: bool) -> LanguageModel:
    """Frozen, or adapted by adapters that change something."""
    lm = tiny_model(name)
    lm.precision = "bfloat16"
    if not adapted:
        return freeze_model(lm)
    add_lora(lm, LoraSettings(rank=2))
    randomize_trained_weights(lm)
    assert all(parameter.requires_grad == ("lora_" in key) for key, parameter in lm.model.named_parameters())
    return lm


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_held_in_bfloat16_computes_what_autocast_does(
    name: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: autocast rounds a float32 matrix to the same bfloat16 one at every product."""
    narrow = in_bfloat16(name, adapted=adapted)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "cast_frozen_weights", lambda lm: None)
        wide = in_bfloat16(name, adapted=adapted)
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


def test_a_frozen_reward_model_keeps_its_head_in_float32(tiny: TinyWorld) -> None:
    policy, batch = locate_model_folder(tiny.build(tiny.policy)), pack_branches(PROMPTS, COMPLETIONS)
    wide, narrow = (ModelLoader(CPU).initialize_reward_model(policy, seed=0, precision="bfloat16") for _ in range(2))
    freeze_model(narrow)
    assert narrow.model.score.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(narrow(batch, "scores"), wide(batch, "scores"))


def test_in_float32_nothing_is_narrowed() -> None:
    lm = freeze_model(tiny_model("llama"))
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in lm.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_adapters_are_merged_into_the_weights_that_the_folder_has(
    tiny: TinyWorld, tmp_path: Path, kind: str, precision: Any
) -> None:
    """Against W + (alpha / rank) B A in float64; the base is not the rounded one that bfloat16 computes with."""
    source = locate_model_folder(tiny.build(tiny.policy))
    if kind == "policy":
        lm = ModelLoader(CPU).load_policy(source, precision=precision)
    else:
        lm = ModelLoader(CPU).initialize_reward_model(source, seed=0, precision=precision)
    batch = pack_branches(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        plain = lm(batch, "states")
        add_lora(lm, LoraSettings(rank=3, alpha=7.0))
        assert torch.equal(lm(batch, "states"), plain), "it starts as the model that it adapts"
        randomize_trained_weights(lm)
        trained = dict(lm.model.named_parameters())
        before = lm(batch, "states")
        assert not torch.equal(before, plain)
        save_model(lm, tmp_path / "saved")
        assert torch.equal(lm(batch, "states"), before), "and it can be trained further"
    base, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == base.keys() | ({"score.weight"} if kind == "reward" else set())
    for name, weight in base.items():
        expected, path = weight.double(), name.removesuffix(".weight")
        if f"{path}.lora_A.default.weight" in trained:
            down, up = (trained[f"{path}.lora_{side}.default.weight"].detach().double() for side in "AB")
            expected = expected + 7.0 / 3 * up @ down
            assert not torch.equal(saved[name], weight)
        torch.testing.assert_close(saved[name].double(), expected, rtol=0, atol=1e-6)
    if kind == "reward":
        assert torch.equal(saved["score.weight"], trained["score.weight"])


def stage_of(tiny: TinyWorld, kind: str, precision: str = "float32", **settings: Any) -> Stage:
    name, _, init = kind.partition("-")
    common = {"lora": {"rank": 4}, "precision": precision, **({"value_init": init} if init else {}), **settings}
    stage: Stage = getattr(tiny, name)(**common)
    return stage


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[LanguageModel, dict[str, torch.Tensor]]]]:
    """Every model that got adapters, with its weights as they were then."""
    adapted_models: list[tuple[LanguageModel, dict[str, torch.Tensor]]] = []

    def adapting(lm: LanguageModel, lora: LoraSettings) -> None:
        add_lora(lm, lora)
        adapted_models.append((lm, {name: p.detach().clone() for name, p in lm.model.named_parameters()}))

    for name in ("sft", "reward_model", "dpo", "ppo", "ppo_models"):
        monkeypatch.setattr(f"mixpo.stages.{name}.add_lora", adapting)
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
        trained = {name for name, p in lm.model.named_parameters() if p.requires_grad}
        assert trained == {name for name in before if ".lora_" in name or name.startswith("score.")}
        assert any(".lora_" in name for name in trained)
        after = dict(lm.model.named_parameters())
        for name, weight in before.items():
            if name not in trained:
                assert torch.equal(after[name], weight), f"{name} is frozen"
            elif ".lora_B" in name or name == "score.weight":
                assert not torch.equal(after[name], weight), f"{name} learns"
            assert after[name].dtype == torch.float32 or (precision == "bfloat16" and name not in trained)
    tensors = load_file(tmp_path / CHECKPOINT)
    parts = checkpoint._insert_tensors(json.loads(tensors.pop("json").numpy().tobytes()), tensors)["parts"]
    saved_names = {name for part in ("model", "policy", "value") for name in parts.get(part, ())}
    assert saved_names == {name for lm, _ in adapted for name, p in lm.named_parameters() if p.requires_grad}
    start, end = (
        load_file(locate_model_folder(folder) / "model.safetensors")
        for folder in (folders["base" if kind == "sft" else "policy"], tmp_path)
    )
    moved = [name for name in start if not torch.equal(start[name], end[name])]
    assert moved
    assert all("proj" in name for name in moved), "embeddings and norms are as they were"


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
    lm.model.eval()
    assert torch.equal(lm(batch, "logprobs"), lm(batch, "logprobs"))


def test_adapters_stand_where_they_are_asked_for_and_scale_with_the_root_of_the_rank() -> None:
    lm = tiny_model("llama")
    add_lora(lm, LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj", "mlp.up_proj"), rank_stabilized=True))
    adapted = {name.split(".lora_")[0] for name, p in lm.model.named_parameters() if p.requires_grad}
    assert {name.partition("layers.")[2][2:] for name in adapted} == {"self_attn.q_proj", "mlp.up_proj"}
    randomize_trained_weights(lm)
    layer = lm.model.get_submodule(next(name for name in adapted if "q_proj" in name))
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 8.0 / 4**0.5 * product)
    with pytest.raises(
        InputError, match=r"^lora.target_modules: found 'c_attn'; expected layers of the model: down_proj"
    ):
        add_lora(tiny_model("llama"), LoraSettings(target_modules=("q_proj", "c_attn")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_policy_without_its_adapters_is_what_it_started_from(precision: str) -> None:
    frozen, policy = tiny_model("llama"), tiny_model("llama")
    frozen.precision = policy.precision = precision
    freeze_model(frozen)
    add_lora(policy, LoraSettings(rank=2))
    reference = policy.make_view_without_adapters()
    randomize_trained_weights(policy)
    batch = pack_branches(PROMPTS, COMPLETIONS)
    assert torch.equal(reference(batch, "logprobs"), frozen(batch, "logprobs"))
    moved = policy(batch, "logprobs")
    assert not torch.allclose(moved, frozen(batch, "logprobs"))
    moved.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.model.named_parameters() if ".lora_" in name
    }


def test_ppo_with_lora_holds_no_second_model_of_what_it_starts_from(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same metrics as with a model of its own, and one model less."""
    stage = stage_of(tiny, "ppo", "float32")
    folders = {name: tiny.stage_cache.compute_with_inputs(source) for name, source in stage.get_input_stages().items()}
    loaded: list[Path] = []
    load = StageJob.load_policy

    def count_loads(job: StageJob, folder: Path, precision: Any = "float32") -> LanguageModel:
        loaded.append(folder)
        return load(job, folder, precision)

    monkeypatch.setattr(StageJob, "load_policy", count_loads)
    metrics = []
    own = freeze_model(load(StageJob(tmp_path, Runtime(threads=1)), folders["policy"]))
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(LanguageModel, "make_view_without_adapters", lambda lm: own)
        out = tmp_path / str(shared)
        out.mkdir()
        stage.compute(stage.locate_inputs(folders), StageJob(out, Runtime(threads=1)))
        unlike = {"seconds", "sampling_seconds", "updating_seconds"}
        metrics.append([{k: v for k, v in row.items() if k not in unlike} for row in read_metrics(out)])
    assert metrics[0] == metrics[1]
    assert len(loaded) == 2, "the policy, once in each run"
