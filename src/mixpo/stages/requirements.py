"""What the settings of a stage and of the runtime require of each other, and of installed packages."""

import importlib.util

from mixpo.data.errors import InputError
from mixpo.stages.stage import Stage
from mixpo.training.runtime import Runtime

EXCLUSIONS = (
    ("runtime.sharded", "lora.quantize_base", "weights in 4 bits cannot be cut over processes"),
    ("runtime.sharded", "lora.modules_to_save", "it cuts the weights that they start from"),
    ("runtime.sharded", "optimizer: adamw-8bit", "it needs whole weights"),
    ("runtime.offload_optimizer", "optimizer: adamw-8bit", "it keeps AdamW's own moments"),
    ("several processes", "sampler: vllm", "a server samples for one process"),
    ("lora.modules_to_save", "sampler: vllm", "a server takes over adapters alone"),
)
"""Settings of which a stage can have one, and why."""


def check_requirements(stage: Stage, runtime: Runtime, process_count: int) -> None:
    """Raise `InputError` if settings of a stage and of the runtime exclude each other, or a package is missing."""
    lora = getattr(stage, "lora", None)
    chosen = {
        "runtime.sharded": runtime.sharded and process_count > 1,
        "several processes": process_count > 1,
        "runtime.offload_optimizer": runtime.offload_optimizer,
        "lora.quantize_base": lora is not None and lora.quantize_base,
        "lora.modules_to_save": lora is not None and len(lora.modules_to_save) > 0,
        "optimizer: adamw-8bit": getattr(stage, "optimizer", None) == "adamw-8bit",
        "sampler: vllm": getattr(stage, "sampler", None) == "vllm",
    }
    trains = hasattr(stage, "optimizer")
    for one, other, reason in EXCLUSIONS:
        if chosen[one] and chosen[other] and (trains or "optimizer" not in other):
            raise InputError(
                f"{one}: found beside {other} in {type(stage).__name__}; expected one of the two, since {reason}; "
                "leave one out"
            )
    for name in ("lora.quantize_base", "optimizer: adamw-8bit"):
        if chosen[name] and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"{name}: found without the package bitsandbytes, which it needs; expected it beside mixpo; run "
                "pip install 'mixpo[qlora]', or leave it out"
            )
