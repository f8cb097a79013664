"""Seeded splits and random subsets of rows."""

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from mixpo.data.errors import InputError

Item = TypeVar("Item")

COMPARISON_SEED = 0
"""Seed of the prompts on which arms are compared: the same prompts for every arm and training seed."""


def split_by_prompt(
    prompts: Sequence[Hashable], held_out_share: float, seed: int, *, setting_name: str, remedy: str
) -> tuple[list[int], list[int]]:
    """Row indices of (kept, held-out) rows, each in order, such that no prompt is in both parts.

    Holds out `held_out_share` of the distinct prompts, at least one and at most all but one. Raises `InputError`,
    naming `setting_name` and `remedy`, if there is only one prompt.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise InputError(
            f"{setting_name}: found one prompt in {len(prompts)} usable rows; rows of one prompt are not split; "
            f"expected at least two prompts, one to train on and one to hold out; {remedy}"
        )
    random.Random(seed).shuffle(distinct)
    held_out = set(distinct[: min(max(1, round(held_out_share * len(distinct))), len(distinct) - 1)])
    rows = range(len(prompts))
    return [row for row in rows if prompts[row] not in held_out], [row for row in rows if prompts[row] in held_out]


def draw_subset(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """A random subset in the original order, a part of any larger one; all items if `count` is None or too large."""
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[index] for index in sorted(order[:count])]
