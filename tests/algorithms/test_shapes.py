"""Shapes that would broadcast to a plausible result are refused by every function that takes several arrays."""

import numpy as np
import pytest
import torch

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.algorithms.kl import kl_k1, kl_k3
from mixpo.algorithms.masked import masked_mean, whiten
from mixpo.algorithms.ppo import (
    clip_fraction,
    explained_variance,
    generalized_advantages,
    policy_loss,
    shaped_rewards,
    value_loss,
)
from mixpo.algorithms.selection import compute_score_gaps
from mixpo.algorithms.win_rates import win_tie_loss_rates

FULL, NARROW, MASK = torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "call",
    [
        lambda: policy_loss(FULL, NARROW, FULL, clip=0.2),
        lambda: policy_loss(FULL, FULL, NARROW, clip=0.2),
        lambda: value_loss(FULL, FULL, NARROW, clip=0.2),
        lambda: generalized_advantages(FULL, NARROW, MASK, discount=1.0, gae_lambda=0.95),
        lambda: shaped_rewards(FULL, NARROW, MASK, FULL[:, 0], kl_coef=0.1, score_clip=None),
        lambda: shaped_rewards(FULL, FULL, MASK, FULL[:1, 0], kl_coef=0.1, score_clip=None),
        lambda: explained_variance(FULL, NARROW, MASK),
        lambda: clip_fraction(FULL, FULL, FULL, MASK[:, :1], clip=0.2),
        lambda: masked_mean(FULL, MASK[:, :1]),
        lambda: whiten(FULL, MASK[:1]),
        lambda: kl_k1(torch.zeros(2), torch.zeros(1)),
        lambda: kl_k3(torch.zeros(2), torch.zeros(1)),
        lambda: compute_crossed_mean_interval(np.zeros(4)),
        lambda: compute_score_gaps(np.zeros((4, 3))),
        lambda: win_tie_loss_rates(np.zeros(2), np.zeros(1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(Exception, match=r"shape|type"):
        call()
