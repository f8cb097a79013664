"""Mean and whitening over the true entries of a mask."""

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of `x` where the mask is true. Raises ValueError if the mask is false everywhere."""
    if not bool(mask.any()):
        raise ValueError("a mean needs a mask that is true somewhere")
    return x[mask].mean()


def whiten(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A copy of `x` with mean 0 and population variance 1 over the mask, 0 elsewhere; equal values give 0."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * variance.clamp(min=1e-8).rsqrt()).masked_fill(~mask, 0.0)
