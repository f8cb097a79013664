"""What the settings of a stage and of the runtime require of each other, and of installed packages."""

import importlib.util

from mixpo.data.errors import InputError
from mixpo.models.adapters import LoraSettings
from mixpo.stages.stage import PolicyStage, RewardStage, Stage
from mixpo.training.runtime import Runtime

EXCLUSIONS = (
    ("runtime.sharded", "lora.quantize_base", "weights in 4 bits cannot be cut over processes"),
    ("runtime.sharded", "lora.modules_to_save", "it cuts the weights that they start from"),
    ("runtime.sharded", "optimizer: adamw-8bit without lora", "it needs whole weights"),
    ("runtime.offload_optimizer", "optimizer: adamw-8bit", "it keeps AdamW's own moments"),
    ("several processes", "sampler: vllm", "a server samples for one process"),
    ("lora.modules_to_save", "sampler: vllm", "a server takes over adapters alone"),
)
"""Settings of which a stage can have one, and why."""


def check_requirements(stage: Stage, runtime: Runtime, process_count: int) -> None:
    """Raise `InputError` if settings of a stage and of the runtime exclude each other, or a package is missing."""
    lora, uses_8_bits = getattr(stage, "lora", None), getattr(stage, "optimizer", None) == "adamw-8bit"
    trainers = _find_module_trainers(stage)
    chosen = {
        "runtime.sharded": stage.select_runtime(runtime).sharded and process_count > 1,
        "several processes": process_count > 1,
        "runtime.offload_optimizer": runtime.offload_optimizer,
        "lora.quantize_base": lora is not None and lora.quantize_base,
        "optimizer: adamw-8bit": uses_8_bits,
        "optimizer: adamw-8bit without lora": uses_8_bits and lora is None,
        "sampler: vllm": getattr(stage, "sampler", None) == "vllm",
    }
    for one, other, reason in EXCLUSIONS:
        place = type(stage).__name__
        if "lora.modules_to_save" in (one, other):
            # a server computes the policy alone
            names = [name for name in trainers if name == "policy" or other != "sampler: vllm"]
            chosen["lora.modules_to_save"] = bool(names)
            if names and trainers[names[0]] is not stage:
                place += f", whose {names[0]} has those of {type(trainers[names[0]]).__name__}"
        if chosen[one] and chosen[other]:
            raise InputError(
                f"{one}: found beside {other} in {place}; expected one of the two, since {reason}; leave one out"
            )
    for name in ("lora.quantize_base", "optimizer: adamw-8bit"):
        if chosen[name] and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"{name}: found without the package bitsandbytes, which it needs; expected it beside mixpo; run "
                "pip install 'mixpo[qlora]', or leave it out"
            )


def _find_module_trainers(stage: Stage) -> dict[str, Stage]:
    """The stages that trained modules whole beside adapters, by the name of the model that a stage loads with them.

    That is its input, or `policy` for the model that it trains.
    """
    models: dict[str, Stage] = {
        name: source
        for name, source in stage.get_input_stages().items()
        if isinstance(source, PolicyStage | RewardStage)
    }
    if "lora" in type(stage).model_fields:
        if getattr(stage, "lora", None) is None and stage.shares_equal_reference:
            models = {name: source for name, source in models.items() if source != models["policy"]}
        models["policy"] = stage  # with the adapters that it starts from, or with all of them merged
    found = {name: _find_module_trainer(model) for name, model in models.items()}
    return {name: trainer for name, trainer in found.items() if trainer is not None}


def _find_module_trainer(stage: Stage) -> Stage | None:
    """The stage that trained modules of a stage's model whole beside its adapters: itself, or one before; or None."""
    lora: LoraSettings | None = getattr(stage, "lora", None)
    if lora is None:  # the weights are whole, and adapters were merged into them
        return None
    if lora.modules_to_save:
        return stage
    start = stage.get_input_stages().get("policy")
    return None if start is None else _find_module_trainer(start)
