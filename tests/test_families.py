"""Every family's folder: in, out again, and the same numbers from plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from families import FAMILIES, make_family
from mixpo.data.branches import pack
from mixpo.data.errors import InputError
from mixpo.models.language_model import branch_logprobs, branch_scores
from mixpo.models.loading import load_policy, load_reward_model, new_reward_model, same_tokens, save_model

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
    lm = load_policy(family_folder(folders, name), device=CPU)
    prompts, completions = rows(lm)
    with torch.no_grad():
        ours = branch_logprobs(lm, pack(prompts, completions, share_prompt=lm.shares_prompts))
    save_model(lm, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == (
        load_file(folders / name / "model.safetensors").keys()
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    for row, prompt in enumerate(prompts):
        for k, completion in enumerate(completions[row]):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            expected = [logits[len(prompt) - 1 + place, token] for place, token in enumerate(completion)]
            torch.testing.assert_close(ours[row, k, : len(completion)], torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_reward_model_is_the_same_in_plain_transformers(folders: Path, tmp_path: Path, name: str) -> None:
    lm = new_reward_model(family_folder(folders, name), seed=3, device=CPU)
    prompts, completions = rows(lm)
    with torch.no_grad():
        lm.model.score.weight.mul_(20)
        ours = branch_scores(lm, pack(prompts, completions, share_prompt=lm.shares_prompts)).flatten()
    saved = tmp_path / "saved"
    save_model(lm, saved)
    again = load_reward_model(saved, device=CPU)
    with torch.no_grad():
        reloaded = branch_scores(again, pack(prompts, completions, share_prompt=again.shares_prompts)).flatten()
    torch.testing.assert_close(reloaded, ours, rtol=1e-5, atol=1e-5)
    assert same_tokens(again.tokenizer, load_policy(folders / name, device=CPU).tokenizer)

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
        load_policy(family_folder(folders, name), device=CPU)
