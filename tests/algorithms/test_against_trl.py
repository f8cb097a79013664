"""Losses of one batch as TRL's trainers compute them, against ours on plain forward passes of the same tiny models.

Every sequence here is passed through the model alone and unpadded; TRL batches, pads and masks by its own code.
Models are float64; TRL's causal trainers take log-probs in float32, hence their wider tolerance.
"""

import warnings

import pytest
import torch

from mixpo.algorithms.preference import bradley_terry_loss, dpo_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", exc_type=ImportError)
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own and of what it imports
WORDS = [
    "how",
    "are",
    "you",
    "what",
    "is",
    "it",
    "fine",
    "thanks",
    "bad",
    "no",
    "a",
    "very",
    "long",
    "answer",
    "to",
    "read",
]
PAIRS = [
    {"prompt": "how are you", "chosen": " fine thanks", "rejected": " bad"},
    {"prompt": "what is it", "chosen": " a answer", "rejected": " no no no a very long answer to read"},
    {"prompt": "what", "chosen": " is it", "rejected": " is it you"},
]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def tiny(architecture, tokenizer, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform, so that policy and reference disagree
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    return architecture(config).double()


def options(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": len(PAIRS),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def loss_of_trl(trainer):
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch).detach().double()


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def completion_logprobs(model, tokenizer, prompt, completion):
    """Log-probs of the completion's tokens and of its end token, in nats, one by one."""
    prompt_ids = encoded(tokenizer, prompt)
    ids = [*prompt_ids, *encoded(tokenizer, completion), tokenizer.eos_token_id]
    logprobs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[place - 1, ids[place]]) for place in range(len(prompt_ids), len(ids))]


@torch.no_grad()
def score(model, tokenizer, text):
    return float(model.eval()(torch.tensor([[*encoded(tokenizer, text), tokenizer.eos_token_id]])).logits[0, 0])


def column(values):
    return torch.tensor(list(values), dtype=torch.float64)


def test_dpo_loss_is_that_of_trl(tokenizer, tmp_path):
    policy, reference = (tiny(LlamaForCausalLM, tokenizer, seed) for seed in (0, 1))
    four = [
        column(sum(completion_logprobs(model, tokenizer, p["prompt"], p[side])) for p in PAIRS)
        for model in (policy, reference)
        for side in ("chosen", "rejected")
    ]
    ours = dpo_loss(*four, beta=0.3)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(beta=0.3, **options(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    theirs = loss_of_trl(trainer)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=0)


def test_bradley_terry_loss_is_that_of_trl(tokenizer, tmp_path):
    model = tiny(LlamaForSequenceClassification, tokenizer, 2)
    chosen, rejected = (
        column(score(model, tokenizer, p["prompt"] + p[side]) for p in PAIRS) for side in ("chosen", "rejected")
    )
    ours = bradley_terry_loss(chosen, rejected)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    theirs = loss_of_trl(trainer)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-12, atol=0)


def test_mean_nll_of_completion_tokens_is_the_sft_loss_of_trl(tokenizer, tmp_path):
    model = tiny(LlamaForCausalLM, tokenizer, 3)
    rows = [{"prompt": p["prompt"], "completion": p["rejected"]} for p in PAIRS]
    tokens = [x for row in rows for x in completion_logprobs(model, tokenizer, row["prompt"], row["completion"])]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(completion_only_loss=True, **options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = loss_of_trl(trainer)
    torch.testing.assert_close(-column(tokens).mean(), theirs, rtol=1e-6, atol=0)
