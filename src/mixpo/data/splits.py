"""Which rows are held out and which are drawn: by seed, and rows that share a prompt stay together."""

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from mixpo.data.errors import InputError

Item = TypeVar("Item")

COMPARISON_SEED = 0
"""Seed by which prompts are drawn that arms and seeds are compared on: the same ones for all of them."""


def hold_out(
    prompts: Sequence[Hashable], share: float, seed: int, *, setting: str, remedy: str
) -> tuple[list[int], list[int]]:
    """Split rows by their prompts: the places of the rows that stay and of those held out, each in order.

    `share` of the different prompts is held out, at least one and at most all but one, so that no prompt is on both
    sides. Raises `InputError`, in the name of a setting, where there is only one prompt.
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise InputError(
            f"{setting}: found one prompt in {len(prompts)} usable rows, and rows of one prompt are not split; "
            f"expected at least two prompts, one to train on and one to hold out; {remedy}"
        )
    random.Random(seed).shuffle(different)
    held = set(different[: min(max(1, round(share * len(different))), len(different) - 1)])
    places = range(len(prompts))
    return [n for n in places if prompts[n] not in held], [n for n in places if prompts[n] in held]


def draw_subset(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """Draw `count` of the items, in their order; all of them where there are no more or no count is given.

    At one seed a larger draw holds a smaller one.
    """
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[place] for place in sorted(order[:count])]
