"""Loading of models from Hugging Face folders, with checks of every weight and of what they compute."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.tokens import find_completion_end_token
from mixpo.models.adapter_folders import (
    AdapterFolder,
    add_adapter_folder,
    holds_adapters,
    merge_adapter_folder,
    read_adapter_folder,
)
from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.digests import compute_model_digest, refuse_model_changed_since_stage
from mixpo.models.folders import (
    ModelFolder,
    explain_loading_errors,
    load_weights,
    read_policy_folder,
    read_reward_folder,
    refuse_non_finite_weights,
)
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network, Precision
from mixpo.models.reward_heads import (
    draw_head_weight,
    find_classifier_class,
    find_head_width,
    find_score_head,
    make_score_head,
)
from mixpo.models.verification import compute_reference_outputs, draw_probe_tokens, verify_model
from mixpo.models.weight_types import compute_in_float32, freeze_network

NetworkKey = tuple[str, Precision, bool]
"""Digest of a model's folder, precision, and whether it is held in 4 bits."""


class ModelLoader:
    """Loading of the models of one computation, in which frozen models and those with adapters share what is equal.

    A frozen model is held in the type that it computes in. All frozen models from one folder, and all models with
    adapters on it, are one network in memory, which is freed with the last of them.
    """

    def __init__(self, device: torch.device, prepare_network: Callable[[Network], None] | None = None) -> None:
        """`prepare_network` is called with every new network, after its checks and before adapters are added."""
        self.device, self.prepare_network = device, prepare_network
        self._networks: WeakValueDictionary[NetworkKey, Network] = WeakValueDictionary()
        self._fields: dict[NetworkKey, dict[str, Any]] = {}
        """Fields of the models without adapters on the networks, by the same keys."""

    def load_policy(self, folder: Path, precision: Precision = "float32", *, quantize: bool = False) -> LanguageModel:
        """Load a frozen policy from its folder. Raises `InputError` if its weights or its outputs are wrong."""
        refuse_model_changed_since_stage(folder)
        if not holds_adapters(folder):
            return self._load_shared_model(folder, precision, read_policy_folder, quantize=quantize)
        adapters = read_adapter_folder(folder)
        if adapters.head is not None:
            raise InputError(f"{folder}: found adapters of a reward model; expected those of a policy")
        return self._load_model_with_adapters(adapters, precision, quantize=quantize)

    def load_reward_model(
        self, folder: Path, precision: Precision = "float32", *, quantize: bool = False
    ) -> LanguageModel:
        """Load a frozen reward model: a one-label classifier, or adapters and a head. Raises `InputError`."""
        refuse_model_changed_since_stage(folder)
        if not holds_adapters(folder):
            return self._load_shared_model(folder, precision, read_reward_folder, quantize=quantize)
        adapters = read_adapter_folder(folder)
        if adapters.head is None:
            raise InputError(f"{folder}: found adapters of a policy; expected those of a reward model, with its head")
        lm = self._load_model_with_adapters(adapters, precision, quantize=quantize)
        lm.head, lm.is_reward_model = lm.adapters[-1], True
        if lm.head not in lm.network.heads:
            lm.network.heads[lm.head] = make_score_head(adapters.head).to(self.device)
        return lm

    def load_trainable_policy(
        self, folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load a policy to train: new adapters on the shared network, or without `lora` all weights, in float32."""
        if lora is None:
            return self._load_private_model(folder, precision)
        lm = self.load_policy(folder, precision, quantize=lora.quantize_base)
        add_lora(lm, lora)
        return lm

    def load_value_model(
        self, folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load a reward model to train on as a value model, as `load_trainable_policy` loads a policy, and its head."""
        if lora is None:
            return self._load_private_model(folder, precision, is_reward_model=True)
        lm = self.load_reward_model(folder, precision, quantize=lora.quantize_base)
        add_lora(lm, lora, "trained-value")
        return lm

    def initialize_reward_model(
        self, policy_folder: Path, *, seed: int, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Make a reward model to train of a policy and a scalar head from N(0, 1/(width+1)) (Stiennon et al. 2020)."""
        if lora is None:
            return self._load_private_model(policy_folder, precision, is_reward_model=True, head_seed=seed)
        lm = self.load_policy(policy_folder, precision, quantize=lora.quantize_base)
        weight = draw_head_weight(find_head_width(lm.model.config, policy_folder), seed)
        lm.network.heads["random"] = make_score_head(weight).to(self.device)
        lm.head, lm.is_reward_model = "random", True
        add_lora(lm, lora, "trained-value")
        return lm

    def check_policy_folder(self, folder: Path) -> None:
        """Raise `InputError` unless a whole policy, and a reward model made of it, compute as in transformers.

        Each is loaded in the type of its file, and freed again.
        """
        self._load_private_model(folder, "float32", dtype=None)
        self._load_private_model(folder, "float32", is_reward_model=True, head_seed=0, dtype=None)

    def load_merged_model(self, folder: Path) -> LanguageModel:
        """Load a policy or a reward model from its adapters, merged into the weights of their base in its own type."""
        is_reward_model = read_adapter_folder(folder).head is not None
        return self._load_private_model(folder, "float32", is_reward_model=is_reward_model, dtype=None)

    def _load_shared_model(
        self, folder: Path, precision: Precision, read_folder: Callable[[Path], ModelFolder], *, quantize: bool
    ) -> LanguageModel:
        """A new model on the one frozen network of a whole model's folder."""
        with explain_loading_errors(folder):
            key = compute_model_digest(folder), precision, quantize
        network = self._networks.get(key)
        if network is not None:
            return LanguageModel(network, **self._fields[key])
        checked = read_folder(folder)
        # not in float32 first: that would take twice the memory for a moment
        dtype = torch.float32 if precision == "float32" else checked.dtype
        model = load_weights(checked, dtype=dtype, quantize=quantize)
        lm = self._wrap_and_verify_model(model, checked, precision, frozen=True)
        self._networks[key] = lm.network
        self._fields[key] = {field.name: getattr(lm, field.name) for field in fields(lm) if field.name != "network"}
        return lm

    def _load_model_with_adapters(
        self, adapters: AdapterFolder, precision: Precision, *, quantize: bool
    ) -> LanguageModel:
        """A model with a folder's adapters, which do not train, on the network of the folder's base."""
        lm = self._load_shared_model(adapters.base, precision, read_policy_folder, quantize=quantize)
        name = compute_model_digest(adapters.path)
        if name not in lm.network.adapter_names:
            add_adapter_folder(lm.network, name, adapters)
        lm.adapters = (name,)
        return lm

    def _load_private_model(
        self,
        folder: Path,
        precision: Precision,
        *,
        is_reward_model: bool = False,
        head_seed: int | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> LanguageModel:
        """A model of which all weights train, with adapters merged; its head is random with a seed.

        The weights have the type `dtype`, or that of the folder if it is None.
        """
        refuse_model_changed_since_stage(folder)
        adapters = read_adapter_folder(folder) if holds_adapters(folder) else None
        if is_reward_model and adapters is None and head_seed is None:
            checked = read_reward_folder(folder)
            model = load_weights(checked, dtype=dtype or checked.dtype)
        else:
            checked = read_policy_folder(folder if adapters is None else adapters.base)
            if is_reward_model:
                checked.config.num_labels, checked.config.problem_type = 1, None
            classifier = find_classifier_class(checked.config, folder) if is_reward_model else None
            model = load_weights(
                checked, model_class=classifier, allow_missing_head=is_reward_model, dtype=dtype or checked.dtype
            )
        if adapters is not None:
            merge_adapter_folder(model, adapters)
        if is_reward_model:
            head = find_score_head(model, folder)
            weight = None if adapters is None else adapters.head
            if head_seed is not None:
                weight = draw_head_weight(head.in_features, head_seed)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)
            if weight is not None:
                head.weight.data.copy_(weight)
        return self._wrap_and_verify_model(model, checked, precision, frozen=False)

    def _wrap_and_verify_model(
        self, model: PreTrainedModel, folder: ModelFolder, precision: Precision, *, frozen: bool
    ) -> LanguageModel:
        """Wrap a loaded model as `LanguageModel`. Raises `InputError` if outputs differ from those of transformers."""
        path = folder.path
        refuse_non_finite_weights(path, dict(model.named_parameters()), "download or train the model again")
        model.get_input_embeddings().padding_idx = None  # else the pad token, often an end token, gets no gradient
        model = model.to(self.device).eval()
        is_reward_model = model.get_output_embeddings() is None
        problem = f"a {type(model).__name__}, which cannot compute a prompt with its completions"
        fix = "expected a decoder-only transformer with attention masks"
        with explain_loading_errors(path, problem, fix), compute_in_float32(model):
            tokens = draw_probe_tokens(model, folder.tokenizer)
            expected = compute_reference_outputs(model, tokens)
            lm = LanguageModel(
                Network(model, logit_scale=_read_logit_scale(folder.config)),
                folder.tokenizer,
                find_completion_end_token(folder.tokenizer),
                dtype=folder.dtype,
                folder=path,
                end_tokens=folder.end_tokens,
                unused_tokens=_find_unused_tokens(model, folder.tokenizer),
                head="score" if is_reward_model else None,
                is_reward_model=is_reward_model,
            )
            verify_model(lm, path, tokens, expected)
        lm.network.precision = precision
        if frozen:
            freeze_network(lm.network)
        if self.prepare_network is not None:
            self.prepare_network(lm.network)
        return lm


def _read_logit_scale(config: PretrainedConfig) -> float:
    """Factor by which an architecture multiplies its logits, from its config; 1 if it has none."""
    text = config.get_text_config()
    return float(getattr(text, "logit_scale", 1.0)) / float(getattr(text, "logits_scaling", 1.0))


def _find_unused_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of a model's vocabulary that its tokenizer does not have, sorted: at the end or between its tokens."""
    tokens = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(set(range(model.config.get_text_config().vocab_size)) - tokens))
