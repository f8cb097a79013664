"""What the settings of a stage and of the runtime require of each other, and of installed packages."""

import importlib.util

from mixpo.data.errors import InputError
from mixpo.models.adapters import LoraSettings
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
    lora, module_trainer = getattr(stage, "lora", None), _find_module_trainer(stage)
    chosen = {
        "runtime.sharded": runtime.sharded and stage.cuts_weights and process_count > 1,
        "several processes": process_count > 1,
        "runtime.offload_optimizer": runtime.offload_optimizer,
        "lora.quantize_base": lora is not None and lora.quantize_base,
        "lora.modules_to_save": module_trainer is not None,
        "optimizer: adamw-8bit": getattr(stage, "optimizer", None) == "adamw-8bit",
        "sampler: vllm": getattr(stage, "sampler", None) == "vllm",
    }
    trains = hasattr(stage, "optimizer")
    for one, other, reason in EXCLUSIONS:
        if chosen[one] and chosen[other] and (trains or "optimizer" not in other):
            place = type(stage).__name__
            if "lora.modules_to_save" in (one, other) and module_trainer is not stage:
                place += f", whose policy has those of {type(module_trainer).__name__}"
            raise InputError(
                f"{one}: found beside {other} in {place}; expected one of the two, since {reason}; leave one out"
            )
    for name in ("lora.quantize_base", "optimizer: adamw-8bit"):
        if chosen[name] and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"{name}: found without the package bitsandbytes, which it needs; expected it beside mixpo; run "
                "pip install 'mixpo[qlora]', or leave it out"
            )


def _find_module_trainer(stage: Stage) -> Stage | None:
    """The stage that trained modules of a stage's policy whole beside its adapters: itself, or one before; or None."""
    if "lora" in type(stage).model_fields:
        lora: LoraSettings | None = getattr(stage, "lora", None)
        if lora is None:  # all weights train, and adapters were merged into them
            return None
        if lora.modules_to_save:
            return stage
    start = stage.get_input_stages().get("policy")
    return None if start is None else _find_module_trainer(start)
