"""Losses of one batch as TRL's trainers compute them, against ours on branch batches of the same tiny models.

TRL tokenises, batches, pads and masks by its own code, each completion in a row of its own.
"""

import warnings

import pytest
import torch

from mixpo.algorithms.preference import bradley_terry_loss, dpo_loss
from mixpo.data.branches import pack_branches
from mixpo.data.tokens import tokenize_row
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own and of what it imports
PAIRS = [
    {"prompt": "how are you", "chosen": " fine thanks", "rejected": " bad"},
    {"prompt": "what is it", "chosen": " a answer", "rejected": " no no no a very long answer to read"},
    {"prompt": "what", "chosen": " is it", "rejected": " is it you"},
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = " ".join(text for pair in PAIRS for text in pair.values())
    names = dict.fromkeys(["<pad>", "</s>", "<unk>", *texts.split()])
    vocabulary = {name: place for place, name in enumerate(names)}
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
    return architecture(config).eval()


def loss_of_trl(trainer_class, settings_class, model, tokenizer, tmp_path, rows=PAIRS, settings=None, **models):
    """Loss of one batch with all rows, computed by a trainer of TRL."""
    args = settings_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(PAIRS),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **(settings or {}),
    )
    dataset = Dataset.from_list(rows)
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **models)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch).detach().double()


def batch_of(tokenizer, sides):
    tokens = [tokenize_row(tokenizer, pair["prompt"], [pair[side] for side in sides], max_tokens=64) for pair in PAIRS]
    return pack_branches(*zip(*tokens, strict=True))


def wrapped(model, tokenizer):
    return LanguageModel(Network(model), tokenizer, tokenizer.eos_token_id)


@torch.no_grad()
def test_dpo_loss_is_that_of_trl(tokenizer, tmp_path):
    policy, reference = (tiny(LlamaForCausalLM, tokenizer, seed) for seed in (0, 1))
    batch = batch_of(tokenizer, ("chosen", "rejected"))
    ours = dpo_loss(
        *wrapped(policy, tokenizer)(batch, "logprobs").sum(dim=-1).unbind(dim=1),
        *wrapped(reference, tokenizer)(batch, "logprobs").sum(dim=-1).unbind(dim=1),
        beta=0.3,
    )
    theirs = loss_of_trl(
        trl.DPOTrainer, trl.DPOConfig, policy, tokenizer, tmp_path, settings={"beta": 0.3}, ref_model=reference
    )
    assert ours.std() > 0.1
    torch.testing.assert_close(ours.mean().double(), theirs, rtol=1e-5, atol=0)


@torch.no_grad()
def test_bradley_terry_loss_is_that_of_trl(tokenizer, tmp_path):
    model = tiny(LlamaForSequenceClassification, tokenizer, 2)
    batch = batch_of(tokenizer, ("chosen", "rejected"))
    ours = bradley_terry_loss(*wrapped(model, tokenizer)(batch, "scores").unbind(dim=1))
    theirs = loss_of_trl(trl.RewardTrainer, trl.RewardConfig, model, tokenizer, tmp_path)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours.mean().double(), theirs, rtol=1e-5, atol=0)


@torch.no_grad()
def test_mean_nll_of_completion_tokens_is_the_sft_loss_of_trl(tokenizer, tmp_path):
    model = tiny(LlamaForCausalLM, tokenizer, 3)
    batch = batch_of(tokenizer, ("rejected",))
    ours = -wrapped(model, tokenizer)(batch, "logprobs").sum() / batch.mask.sum()
    rows = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in PAIRS]
    only_completions = {"completion_only_loss": True}
    theirs = loss_of_trl(trl.SFTTrainer, trl.SFTConfig, model, tokenizer, tmp_path, rows, only_completions)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
