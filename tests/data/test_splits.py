import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixpo.data.errors import InputError
from mixpo.data.splits import draw_subset, hold_out


def split(prompts, share=0.1, seed=0):
    return hold_out(prompts, share, seed, setting="data.train", remedy="add rows")


@given(
    st.lists(st.integers(0, 9), min_size=2).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(prompts, share, seed):
    stay, held = split(prompts, share, seed)
    assert sorted(stay + held) == list(range(len(prompts)))
    assert (stay, held) == (sorted(stay), sorted(held))
    assert not {prompts[row] for row in stay} & {prompts[row] for row in held}
    assert stay
    assert held


def test_a_share_of_the_prompts_is_held_out_whatever_number_of_rows_they_have():
    prompts = [prompt for prompt in range(20) for _ in range(1 + prompt)]
    _, held = split(prompts, share=0.25)
    assert len({prompts[row] for row in held}) == 5
    assert held == split(prompts, share=0.25)[1] != split(prompts, share=0.25, seed=1)[1]


def test_rows_of_one_prompt_cannot_be_split():
    with pytest.raises(InputError) as caught:
        split(["a"] * 12)
    assert str(caught.value) == (
        "data.train: found one prompt in 12 usable rows, and rows of one prompt are not split; expected at least two "
        "prompts, one to train on and one to hold out; add rows"
    )


def test_a_draw_is_from_everywhere_in_order_and_larger_ones_hold_smaller_ones():
    drawn = [draw_subset(range(1000), count, seed=0) for count in (10, 50, 400)]
    for rows, count in zip(drawn, (10, 50, 400), strict=True):
        assert len(set(rows)) == count
        assert rows == sorted(rows)
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert 140 < sum(row < 400 for row in drawn[2]) < 180  # 160 ± 2 standard deviations of a uniform draw
    assert drawn[0] != draw_subset(range(1000), 10, seed=1)
    state = random.getstate()
    assert (
        draw_subset("abc", 3, seed=0)
        == draw_subset("abc", None, seed=0)
        == draw_subset("abc", 9, seed=0)
        == ["a", "b", "c"]
    )
    assert random.getstate() == state
