"""Loading of models from Hugging Face folders, with checks of every weight and of what they compute."""

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixpo.data.tokens import find_completion_end_token
from mixpo.models.digests import refuse_model_changed_since_stage
from mixpo.models.folders import (
    ModelFolder,
    explain_loading_errors,
    load_weights,
    read_policy_folder,
    read_reward_folder,
)
from mixpo.models.language_model import LanguageModel, Precision
from mixpo.models.reward_heads import find_classifier_class, find_score_head
from mixpo.models.saving import refuse_non_finite_weights
from mixpo.models.verification import compute_reference_outputs, draw_probe_tokens, verify_model


def load_policy(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """Load a causal language model from its folder. Raises `InputError` if its weights or its outputs are wrong."""
    refuse_model_changed_since_stage(folder)
    checked = read_policy_folder(folder)
    return _wrap_and_verify_model(load_weights(checked), checked, device, precision)


def load_reward_model(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """Load a reward model (a one-label classifier) from its folder. Raises `InputError` if it is not as expected."""
    refuse_model_changed_since_stage(folder)
    checked = read_reward_folder(folder)
    return _wrap_and_verify_model(load_weights(checked), checked, device, precision)


def initialize_reward_model(
    policy_folder: Path, *, seed: int, device: torch.device, precision: Precision = "float32"
) -> LanguageModel:
    """Make a reward model of a policy's weights and a scalar head from N(0, 1/(width+1)) (Stiennon et al. 2020)."""
    refuse_model_changed_since_stage(policy_folder)
    checked = read_policy_folder(policy_folder)
    checked.config.num_labels, checked.config.problem_type = 1, None
    model = load_weights(
        checked, model_class=find_classifier_class(checked.config, policy_folder), allow_missing_head=True
    )
    head = find_score_head(model, policy_folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, head.in_features, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    return _wrap_and_verify_model(model, checked, device, precision)


def _wrap_and_verify_model(
    model: PreTrainedModel, folder: ModelFolder, device: torch.device, precision: Precision
) -> LanguageModel:
    """Wrap a loaded model as `LanguageModel`. Raises `InputError` if outputs differ from those of transformers."""
    path = folder.path
    refuse_non_finite_weights(path, dict(model.named_parameters()), "download or train the model again")
    model.get_input_embeddings().padding_idx = None  # else the pad token, often an end token, gets no gradient
    model = model.to(device).eval()
    problem = f"a {type(model).__name__}, which cannot compute a prompt with its completions"
    with explain_loading_errors(path, problem, "expected a decoder-only transformer with attention masks"):
        tokens = draw_probe_tokens(model, folder.tokenizer)
        expected = compute_reference_outputs(model, tokens)
        lm = LanguageModel(
            model,
            folder.tokenizer,
            find_completion_end_token(folder.tokenizer),
            shares_prompts=True,
            end_tokens=folder.end_tokens,
            logit_scale=_read_logit_scale(folder.config),
            unused_tokens=_find_unused_tokens(model, folder.tokenizer),
            folder=path,
            dtype=folder.dtype,
        )
        verify_model(lm, path, tokens, expected)
    lm.precision = precision
    return lm


def _read_logit_scale(config: PretrainedConfig) -> float:
    """Factor by which an architecture multiplies its logits, from its config; 1 if it has none."""
    text = config.get_text_config()
    return float(getattr(text, "logit_scale", 1.0)) / float(getattr(text, "logits_scaling", 1.0))


def _find_unused_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of a model's vocabulary that its tokenizer does not have, sorted: at the end or between its tokens."""
    tokens = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(set(range(model.config.get_text_config().vocab_size)) - tokens))
