"""Activation checkpointing: layers whose activations are computed again in the backward pass (Chen et al. 2016)."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mixpo.data.errors import InputError


def checkpoint_activations(model: nn.Module, capture_context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Make every decoder layer of a model keep its input alone for the backward pass, in place; results are the same.

    `capture_context` is called in a layer's forward pass and returns a context manager, in which the backward pass
    computes the layer again: whatever a layer reads beside its arguments must be there as it was. Raises `InputError`
    for a model without decoder layers that transformers marks.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"runtime.activation_checkpointing: found {type(model).__name__}, none of whose layers can be computed "
            "again; expected decoder layers; set it to false"
        )
    for layer in layers:
        # the layer's forward and not the layer, so that hooks on the layer (sharding) run once
        layer.forward = functools.partial(_compute_checkpointed, layer.forward, capture_context)


def _compute_checkpointed(
    forward: Callable[..., Any],
    capture_context: Callable[[], AbstractContextManager[Any]],
    *inputs: Any,
    **named_inputs: Any,
) -> Any:
    """A layer's output; where a gradient is needed, only the inputs are kept for it."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named_inputs)

    def make_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of the forward pass and of the second computation."""
        return nullcontext(), capture_context()

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=make_contexts, **named_inputs)
