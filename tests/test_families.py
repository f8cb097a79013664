"""Every family's folder: in, out again, and the same numbers from plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from families import FAMILIES, family_tokenizer, make_family
from mixpo import DPO, PPO, SFT, Data, Evaluation, Pretrained, RewardModel, Runtime, Samples, Selection, StageCache
from mixpo.data.errors import InputError
from mixpo.data.tokens import find_completion_end_token
from mixpo.experiments.preview import make_data_preview, read_recipe_or_source
from mixpo.models.loading import ModelLoader
from mixpo.models.saving import save_model
from mixpo.models.scoring import compute_scores, compute_token_logprobs
from mixpo.stages.rows import read_table
from models import assert_plain_logprobs, plain_logprobs

CPU = torch.device("cpu")
REFUSED = {
    "gemma2": "which caps its attention scores and caps its logits; expected",
    "falcon": "draws completions from another distribution than it computes",
    "bloom": "found a BloomForCausalLM, which cannot compute a prompt with its completions",
}
WITHOUT_CLASSIFIER = {"granite"}
SUPPORTED = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def family_folder(folders: Path, name: str) -> Path:
    folder = folders / name
    return folder if folder.exists() else make_family(name, folder)


def rows(lm) -> tuple[list[list[int]], list[list[list[int]]]]:  # type: ignore[no-untyped-def]
    """Prompts of unlike length, each with a completion that ends and one that was cut off."""
    text = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The cat sleeps", "No, bake it")]
    end = [[*text[0][:2], lm.end_token], text[1][1:3]]
    return [text[0], text[1][:2]], [end, [[*text[1], lm.end_token], text[0]]]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_policy_is_the_same_in_plain_transformers(folders: Path, tmp_path: Path, name: str) -> None:
    lm = ModelLoader(CPU).load_policy(family_folder(folders, name))
    prompts, completions = rows(lm)
    ours = compute_token_logprobs(lm, prompts, completions, token_budget=100)
    save_model(lm, tmp_path / "saved")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", folders / name))
    assert saved.keys() == original.keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert_plain_logprobs(plain, prompts, completions, ours, 1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_reward_model_is_the_same_in_plain_transformers(folders: Path, tmp_path: Path, name: str) -> None:
    lm = ModelLoader(CPU).initialize_reward_model(family_folder(folders, name), seed=3)
    prompts, completions = rows(lm)
    lm.score_head.weight.data.mul_(20)
    ours = compute_scores(lm, prompts, completions, token_budget=100).flatten()
    saved = tmp_path / "saved"
    save_model(lm, saved)
    again = ModelLoader(CPU).load_reward_model(saved)
    reloaded = compute_scores(again, prompts, completions, token_budget=100).flatten()
    torch.testing.assert_close(reloaded, ours, rtol=1e-5, atol=1e-5)
    assert again.tokenization_digest == ModelLoader(CPU).load_policy(folders / name).tokenization_digest

    tokenizer, config = AutoTokenizer.from_pretrained(saved), json.loads((saved / "config.json").read_text())
    assert tokenizer.pad_token_id == config["pad_token_id"]
    sequences = [prompt + completion for row, prompt in enumerate(prompts) for completion in completions[row]]
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        if name in WITHOUT_CLASSIFIER:
            base = AutoModel.from_pretrained(saved, attn_implementation="eager")
            states = base(**batch).last_hidden_state[range(4), batch["attention_mask"].sum(1) - 1]
            plain = states @ load_file(saved / "model.safetensors")["score.weight"][0]
        else:
            classifier = AutoModelForSequenceClassification.from_pretrained(saved, attn_implementation="eager")
            plain = classifier(**batch).logits[:, 0]
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_would_be_computed_wrongly_is_refused(folders: Path, name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        ModelLoader(CPU).load_policy(family_folder(folders, name))


ANSWERS = ("The world is round.", "No, it is not.", "Paris", "print(add(1, 2))", "It takes flour and water.")


def write_rows_of(family: str, file: Path, first: int, count: int) -> Path:
    """Preference rows as messages, or as text where the family has no chat template."""
    templated = family_tokenizer(family).chat_template is not None
    rows = []
    for number in range(first, first + count):
        question = f"What is {number} + {number}?"
        prompt = [{"role": "user", "content": question}] if templated else f"{question}\n"
        chosen, rejected = (f"{ANSWERS[(number + shift) % len(ANSWERS)]} {number}" for shift in (0, 1))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family_goes_through_the_whole_method(folders: Path, tmp_path: Path, name: str) -> None:
    model = family_folder(folders, name)
    files = [str(write_rows_of(name, tmp_path / f"{part}.jsonl", first, 8)) for part, first in (("a", 0), ("b", 8))]

    shown = make_data_preview(read_recipe_or_source(files[0], model=str(model)))
    chosen = next(side for side in shown.examples[0].texts if side.name == "chosen")
    assert "The world is round. 0" in chosen.text
    assert chosen.pieces[-1].control
    assert not shown.warnings

    short = {"max_completion_tokens": 16, "batch_size": 4, "warmup_steps": 0}
    base = Pretrained(path=str(model))
    data = Data(base=base, format="preference", train=(files[0],), test=(files[1],), max_prompt_tokens=120)
    sft = SFT(base=base, data=data, learning_rate=1e-3, **short)
    reward = RewardModel(policy=sft, pairs=data.train_pairs, data=data, learning_rate=1e-3, **short)
    samples = Samples(policy=sft, reward=reward, rows=data.train_pairs, max_completion_tokens=16)
    selection = Selection(samples=samples, easy_fraction=0.5)
    dpo = DPO(policy=sft, reference=sft, pairs=selection.easy_pairs, learning_rate=1e-4, samplings=1, **short)
    mpo = PPO(
        policy=dpo, reference=dpo, sft=sft, reward=reward, prompts=selection.hard_pairs, learning_rate=1e-4, **short
    )
    evaluation = Evaluation(policy=mpo, sft=sft, reward=reward, data=data, max_completion_tokens=16)
    stage_cache = StageCache(tmp_path / "cache", Runtime(threads=1))
    stage_cache.compute_with_inputs(evaluation)

    first = json.loads((stage_cache.locate_folder(mpo) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_abs_per_token"] < 1e-4, "the policy starts as its own reference"
    tokenizer = AutoTokenizer.from_pretrained(model)
    known = set(tokenizer.get_vocab().values())
    rows = read_table(stage_cache.locate_folder(samples) / "pairs.parquet")
    assert {token for row in rows for side in row["tokens"] for token in side} <= known
    policy = AutoModelForCausalLM.from_pretrained(stage_cache.locate_folder(sft) / "model", attn_implementation="eager")
    ended = policy.generation_config.eos_token_id
    assert find_completion_end_token(tokenizer) in (ended if isinstance(ended, list) else [ended])
    prompt = rows[0]["prompt"]
    if isinstance(prompt, str):
        prompt = tokenizer(prompt)["input_ids"]
    else:
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        token_logprobs = plain_logprobs(policy, prompt, rows[0]["tokens"][0])
    torch.testing.assert_close(token_logprobs, torch.tensor(rows[0]["logprobs"][0]), rtol=1e-3, atol=1e-3)
    if name not in WITHOUT_CLASSIFIER:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            stage_cache.locate_folder(reward) / "model", attn_implementation="eager"
        )
        with torch.no_grad():
            score = float(classifier(input_ids=torch.tensor([prompt + rows[0]["tokens"][0]])).logits)
        assert score == pytest.approx(rows[0]["scores"][0], abs=1e-3)
