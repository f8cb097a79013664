"""Statistics over what a mask lets through."""

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The mean of `x` where the mask is true. Raises ValueError on a mask that is true nowhere."""
    if not bool(mask.any()):
        raise ValueError("a mean needs a mask that is true somewhere")
    return x[mask].mean()


def whiten(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Shift and scale `x` to mean 0 and population variance 1 over the mask.

    0 where the mask is false. A variance below 1e-8 is raised to it, so equal values give 0 and not noise.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * variance.clamp(min=1e-8).rsqrt()).masked_fill(~mask, 0.0)
