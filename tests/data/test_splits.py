import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixpo.data.errors import InputError
from mixpo.data.splits import draw_subset, split_by_prompt


def split(prompts, share=0.1, seed=0):
    return split_by_prompt(prompts, share, seed, setting_name="data.train", remedy="add rows")


@given(
    st.lists(st.integers(0, 9), min_size=2).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_split_is_a_partition_by_prompt(prompts, share, seed):
    kept, held_out = split(prompts, share, seed)
    assert sorted(kept + held_out) == list(range(len(prompts)))
    assert (kept, held_out) == (sorted(kept), sorted(held_out))
    assert not {prompts[row] for row in kept} & {prompts[row] for row in held_out}
    assert kept
    assert held_out


def test_the_share_counts_prompts_and_not_rows():
    prompts = [prompt for prompt in range(20) for _ in range(1 + prompt)]
    _, held_out = split(prompts, share=0.25)
    assert len({prompts[row] for row in held_out}) == 5
    assert held_out == split(prompts, share=0.25)[1] != split(prompts, share=0.25, seed=1)[1]


def test_rows_of_one_prompt_cannot_be_split():
    with pytest.raises(InputError) as caught:
        split(["a"] * 12)
    assert str(caught.value) == (
        "data.train: found one prompt in 12 usable rows; rows of one prompt are not split; expected at least two "
        "prompts, one to train on and one to hold out; add rows"
    )


def test_subsets_are_uniform_ordered_and_nested():
    subsets = [draw_subset(range(1000), count, seed=0) for count in (10, 50, 400)]
    for rows, count in zip(subsets, (10, 50, 400), strict=True):
        assert len(set(rows)) == count
        assert rows == sorted(rows)
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert 140 < sum(row < 400 for row in subsets[2]) < 180  # 160 ± 2 standard deviations of a uniform draw
    assert subsets[0] != draw_subset(range(1000), 10, seed=1)
    state = random.getstate()
    for count in (3, None, 9):
        assert draw_subset("abc", count, seed=0) == ["a", "b", "c"]
    assert random.getstate() == state
