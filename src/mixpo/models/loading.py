"""Loading models from Hugging Face folders, checked."""

from pathlib import Path

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixpo.data.tokens import find_end_token
from mixpo.models.digests import refuse_changed_model
from mixpo.models.folders import (
    ModelFolder,
    explain_loading_errors,
    load_weights,
    read_policy_folder,
    read_reward_folder,
)
from mixpo.models.language_model import (
    LanguageModel,
    Precision,
)
from mixpo.models.reward_heads import find_classifier_class, find_score_head
from mixpo.models.saving import refuse_non_finite_weights
from mixpo.models.verification import compute_plain_outputs, draw_probe_tokens, verify_model


def load_policy(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A causal language model from a folder, checked: every weight is there, and is computed with as it should be."""
    refuse_changed_model(folder)
    checked = read_policy_folder(folder)
    return _wrap(load_weights(checked), checked, device, precision)


def load_reward_model(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A reward model from a folder: a sequence classifier with one label."""
    refuse_changed_model(folder)
    checked = read_reward_folder(folder)
    return _wrap(load_weights(checked), checked, device, precision)


def new_reward_model(
    policy: Path, *, seed: int, device: torch.device, precision: Precision = "float32"
) -> LanguageModel:
    """A reward model with a policy's weights and a new scalar head, drawn from N(0, 1/(width+1)) (Stiennon 2020)."""
    refuse_changed_model(policy)
    checked = read_policy_folder(policy)
    checked.config.num_labels, checked.config.problem_type = 1, None
    model = load_weights(checked, network=find_classifier_class(checked.config, policy), new_head=True)
    head = find_score_head(model, policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, head.in_features, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    return _wrap(model, checked, device, precision)


def _wrap(model: PreTrainedModel, folder: ModelFolder, device: torch.device, precision: Precision) -> LanguageModel:
    path = folder.path
    refuse_non_finite_weights(path, dict(model.named_parameters()), "download or train the model again")
    model.get_input_embeddings().padding_idx = None  # else the pad token, often an end token, would never learn
    model = model.to(device).eval()
    odd = f"a {type(model).__name__}, which cannot compute a prompt with its completions"
    with explain_loading_errors(path, odd, "expected a decoder-only transformer with attention masks"):
        tokens = draw_probe_tokens(model, folder.tokenizer)
        expected = compute_plain_outputs(model, tokens)
        lm = LanguageModel(
            model,
            folder.tokenizer,
            find_end_token(folder.tokenizer),
            shares_prompts=True,
            end_tokens=folder.end_tokens,
            logit_scale=_logit_scale(folder.config),
            unused_tokens=_unused_tokens(model, folder.tokenizer),
            folder=path,
            dtype=folder.dtype,
        )
        verify_model(lm, path, tokens, expected)
    lm.precision = precision
    return lm


def _logit_scale(config: PretrainedConfig) -> float:
    """What the architecture multiplies its logits by; wrong for one that does it by another name, which is refused."""
    text = config.get_text_config()
    return float(getattr(text, "logit_scale", 1.0)) / float(getattr(text, "logits_scaling", 1.0))


def _unused_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of a model's vocabulary that are no token of its tokenizer: padding at the end, and holes."""
    tokens = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(set(range(model.config.get_text_config().vocab_size)) - tokens))
