"""Mixed Preference Optimization of language models: SFT, reward model, resampling, DPO and PPO as one experiment.

from mixpo import DPO, PPO, SFT, Data, StageCache, Evaluation, Pretrained, RewardModel, Runtime, Samples, Selection
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixpo.stages.data import Data
    from mixpo.stages.dpo import DPO
    from mixpo.stages.evaluation import Evaluation
    from mixpo.stages.ppo import PPO
    from mixpo.stages.pretrained import Pretrained
    from mixpo.stages.reward_model import RewardModel
    from mixpo.stages.samples import Samples
    from mixpo.stages.selection import Selection
    from mixpo.stages.sft import SFT
    from mixpo.stages.stage_cache import StageCache
    from mixpo.training.runtime import Runtime

__version__ = version("mixpo")
__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "Data",
    "Evaluation",
    "Pretrained",
    "RewardModel",
    "Runtime",
    "Samples",
    "Selection",
    "StageCache",
]

_MODULES = {
    "RewardModel": "stages.reward_model",
    "Runtime": "training.runtime",
    "StageCache": "stages.stage_cache",
}


def __getattr__(name: str) -> Any:
    """Import a stage at its first use: importing torch takes seconds, which `mixpo --help` should not."""
    if name not in __all__:
        raise AttributeError(f"module 'mixpo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mixpo.{_MODULES.get(name, f'stages.{name.lower()}')}"), name)
