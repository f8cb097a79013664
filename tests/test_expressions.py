"""A wrong expression over stages fails where it is written, and padded completions are what their lists are."""

from pathlib import Path

import pydantic
import pytest
import torch

from mixpo import DPO, PPO, SFT, Data, Pretrained, RewardModel
from mixpo.data.branches import Completions, pack_branches
from mixpo.models.samplers import LocalSampler
from mixpo.stages.stage import Part, Stage

BASE = Pretrained()
DATA = Data(base=BASE)
POLICY = SFT(base=BASE, data=DATA)
REWARD = RewardModel(policy=POLICY, pairs=DATA.train_pairs, data=DATA)


@pytest.mark.parametrize(
    ("field", "wrong", "expected"),
    [
        ("policy", DATA, "PolicyStage"),
        ("reference", REWARD, "PolicyStage"),
        ("reward", POLICY, "RewardStage"),
        ("prompts", POLICY, "Part"),
    ],
)
def test_a_stage_that_offers_something_else_is_refused(field: str, wrong: Stage, expected: str) -> None:
    right = {"policy": POLICY, "reference": POLICY, "sft": POLICY, "reward": REWARD, "prompts": DATA.train_pairs}
    assert isinstance(PPO(**right), PPO)
    with pytest.raises(pydantic.ValidationError, match=rf"(?s)1 validation error for PPO\n{field}\n.*{expected}"):
        PPO(**{**right, field: wrong})


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(DATA, "found no part 'esay'; expected train or second"), (POLICY, "a stage that has parts")],
)
def test_a_part_that_no_stage_has_is_refused(stage: Stage, expected: str) -> None:
    assert Part(stage=DATA, of="train").get_path_within(Path("folder")) == Path("folder/train.parquet")
    with pytest.raises(pydantic.ValidationError, match=expected):
        DPO(policy=POLICY, reference=POLICY, pairs=Part(stage=stage, of="esay"))


def test_padded_completions_are_packed_as_their_lists_are() -> None:
    prompts, lists = [[1, 2], [3], [4, 5, 6]], [[[7], [8, 9, 10, 11]], [[12, 13], [14]], [[15], [16]]]
    padded = Completions.from_lists(lists)
    assert padded.to_lists() == lists
    for rows in ([1, 2], [2, 0]):
        one = pack_branches(prompts, padded, rows)
        other = pack_branches([prompts[row] for row in rows], [lists[row] for row in rows])
        for name, tensor in vars(other).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(getattr(one, name), tensor), name


def test_a_sampler_without_a_policy_says_so() -> None:
    with pytest.raises(RuntimeError, match="call load_policy first"):
        LocalSampler(cache_bytes=8).draw([[1]], k=1, max_tokens=1, seed=0)
