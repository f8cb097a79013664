"""Attention of branch batches: a prompt over itself, a completion over its prompt and itself, and nothing else.

Transformers' models call whatever attention is registered under the name that they were loaded with. Ours is
PyTorch's, but while a branch batch goes through the model it is called piece by piece, so that what no token may see
is not computed, and no mask over the whole row is made.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixpo.data.branches import Span

NAME = "mixpo_branches"
_spans: ContextVar[Sequence[Span]] = ContextVar("spans", default=())


@contextmanager
def attending(spans: Sequence[Span]) -> Iterator[None]:
    """What goes through a model meanwhile is one row that holds these prompts and completions."""
    token = _spans.set(spans)
    try:
        yield
    finally:
        _spans.reset(token)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads length width"],
    key: Float[Tensor, "1 kv_heads length width"],
    value: Float[Tensor, "1 kv_heads length width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 length heads width"], None]:
    spans = _spans.get()
    if not spans:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    groups = query.shape[1] // key.shape[1]
    sizes = [size for span in spans for size in (span.prompt, *span.completions)]
    queries, keys, values = (
        iter(whole.split(sizes, dim=2)) for whole in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    pieces = []
    for span in spans:
        prompt = next(queries), next(keys), next(values)
        pieces.append(_attend(*prompt, sliding_window, dropout, scaling))
        for _ in span.completions:
            seen = torch.cat([prompt[1], next(keys)], dim=2), torch.cat([prompt[2], next(values)], dim=2)
            pieces.append(_attend(next(queries), *seen, sliding_window, dropout, scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _attend(
    query: Float[Tensor, "1 heads queries width"],
    key: Float[Tensor, "1 heads keys width"],
    value: Float[Tensor, "1 heads keys width"],
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Float[Tensor, "1 heads queries width"]:
    """The queries stand at the end of the keys, and none sees what comes after it."""
    length, seen = query.shape[2], key.shape[2]
    whole = length == seen and (window is None or window >= seen)
    mask = None if whole else _mask(length, seen, window, query.dtype, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=whole
    )


@lru_cache(maxsize=64)
def _mask(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "queries keys"]:
    """What is added to the scores; every layer asks for the same few."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if window is not None:
        seen = seen.triu(keys - queries - window + 1)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
