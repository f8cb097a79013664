"""Correctness on a GPU: what is computed there against the same on the CPU, in float32 and bfloat16."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from benchmarks import ours
from benchmarks.workloads import Workload
from mixpo.data.branches import pack_branches
from mixpo.models import attention
from mixpo.models.sampling import sample_completions
from mixpo.training import supervised
from mixpo.training.job import StageJob
from mixpo.training.runtime import Runtime

MODEL = "20m"
WINDOW = 64
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of a log-prob, nats, and of a loss; ten times what rounding makes of it on a CPU."""
CHAIN = (
    Workload("right-sft", "sft", MODEL, batch=8, steps=4, max_tokens=256, lora=8),
    Workload("right-reward", "reward", MODEL, batch=8, steps=4, max_tokens=256, lora=8),
    Workload("right-dpo", "dpo", MODEL, batch=8, steps=4, max_tokens=256, lora=8),
    Workload("right-ppo", "ppo", MODEL, batch=8, steps=2, new_tokens=16, prompt_tokens=96, lora=8),
)
"""MPO's stages, each from the one before."""
Save = Callable[[str, dict[str, Any]], None]


def check_all(chain: Sequence[Workload], inputs: Path, work: Path, save: Save) -> None:
    """Run every check and save its figures: differences, their limits, and whether they are within them."""
    base = inputs / "models" / chain[0].model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = {"llama": base, "sliding window": _make_mistral(base, work)}
    for name, folder in folders.items():
        save(f"branch batches, {name}", check_branch_batches(folder, work, device))
    save("sampling", check_sampling(base, work, device, max_tokens=chain[-1].new_tokens))
    for name, lora in {"all weights": None, "adapters": 8}.items():
        expected = _train_chain(
            [replace(one, lora=lora) for one in chain], inputs, work / name / "cpu", "cpu", "float32"
        )
        for precision, limit in LIMITS.items():
            adapted = [replace(one, lora=lora) for one in chain]
            actual = _train_chain(adapted, inputs, work / name / precision, device, precision)
            save(
                f"stages, {name}, {precision}", {kind: _compare(x, expected[kind], limit) for kind, x in actual.items()}
            )
    dpo = next(workload for workload in chain if workload.kind == "dpo")
    save("resume", check_resume(dpo, inputs, work / "resume", device))
    save("memory settings", check_memory_settings(replace(dpo, lora=None), inputs, device))


def _compare(losses: Sequence[float], expected: Sequence[float], limit: float) -> dict[str, Any]:
    """The largest difference of two courses of a loss, its limit, and whether it is within it."""
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    return {"loss": difference, "limit": limit, "right": difference < limit}


def check_branch_batches(folder: Path, work: Path, device: str) -> dict[str, Any]:
    """Log-probs and gradients on the device, by every way of attention that it has, against the CPU's in float32."""
    generator = random.Random(0)

    def draw(length: int) -> list[int]:
        """Token ids, drawn evenly."""
        return [generator.randrange(5, 49_000) for _ in range(length)]

    prompts = [draw(length) for length in (3, 140, 17, 90)]
    completions = [[draw(length) for length in lengths] for lengths in ((7, 30), (150, 2), (64, 64), (1, 9))]
    batch = pack_branches(prompts, completions)

    def compute(device: str, precision: Any) -> tuple[Tensor, Tensor]:
        """Log-probs, and the gradient of their weighted sum in all weights, as one vector."""
        lm = StageJob(work, Runtime(device=device)).load_trainable_policy(folder, precision)
        logprobs = lm(batch.to(lm.device), "logprobs")
        weights = torch.linspace(-1, 1, logprobs.numel(), device=lm.device).view_as(logprobs)
        (logprobs * weights).sum().backward()
        gradients = [p.grad.flatten() for p in lm.parameters() if p.grad is not None]
        return logprobs.detach().double().cpu(), torch.cat(gradients).double().cpu()

    expected, expected_gradient = compute("cpu", "float32")
    figures: dict[str, Any] = {}
    ways = {"buckets": frozenset[str]()} | ({"flex": frozenset({"cuda"})} if device == "cuda" else {})
    for way, devices in ways.items():
        for precision, limit in LIMITS.items():
            with _replace_attribute(attention, "FLEX_ATTENTION_DEVICES", devices):
                try:
                    logprobs, gradient = compute(device, precision)
                except Exception as error:  # the other ways are of interest all the same
                    figures[f"{way} {precision}"] = {
                        "failed": f"{type(error).__name__}: {str(error)[:500]}",
                        "right": False,
                    }
                    continue
            difference = float((logprobs - expected).abs().max())
            of_gradient = float((gradient - expected_gradient).norm() / expected_gradient.norm())
            figures[f"{way} {precision}"] = {
                "logprobs": difference,
                "gradient": of_gradient,
                "limit": limit,
                "right": difference < limit and of_gradient < limit,
            }
    return figures


def check_sampling(folder: Path, work: Path, device: str, *, max_tokens: int) -> dict[str, Any]:
    """Share of tokens drawn as on the CPU, and kept log-probs against a forward pass, with and without CUDA graphs."""
    generator = random.Random(1)
    prompts = [[generator.randrange(5, 49_000) for _ in range(length)] for length in (3, 40, 17, 90)]
    how: dict[str, Any] = {"k": 2, "max_tokens": max_tokens, "seed": 0}
    cpu = StageJob(work, Runtime(device="cpu")).load_policy(folder)
    expected = sample_completions(cpu, prompts, **how)
    figures = {}
    for precision, limit in LIMITS.items():
        lm = StageJob(work, Runtime(device=device)).load_policy(folder, precision)  # type: ignore[arg-type]
        for fixed_shapes in (False, True):
            sampled = sample_completions(lm, prompts, **how, fixed_shapes=fixed_shapes)
            with torch.no_grad():
                again = lm(pack_branches(prompts, sampled).to(lm.device), "logprobs").cpu()
            difference = float((again - sampled.logprobs).abs().max())
            length = min(expected.tokens.shape[-1], sampled.tokens.shape[-1])
            same = float((expected.tokens[..., :length] == sampled.tokens[..., :length]).float().mean())
            figures[f"{precision}{', fixed shapes' if fixed_shapes else ''}"] = {
                "logprobs": difference,
                "same tokens": same,
                "limit": limit,
                "right": difference < limit and (precision == "bfloat16" or same > 0.9),
            }
    return figures


def _train_chain(
    chain: Sequence[Workload], inputs: Path, work: Path, device: str, precision: str
) -> dict[str, Sequence[float]]:
    """Train MPO's stages on a device, each from the one before; returns the losses by kind of stage."""
    losses = {}
    base = inputs / "models" / chain[0].model
    folders = {"base": base, "policy": base}
    for workload in chain:
        out = work / workload.kind
        spec = replace(workload, runtime={"device": device}, precision=precision).spec(str(inputs))
        spec |= {"out": str(out), "folders": {name: str(folder) for name, folder in folders.items()}}
        losses[workload.kind] = ours.main(spec | {"stage_settings": {"learning_rate": 1e-4}})["losses"]
        if workload.kind == "sft":
            folders |= {"policy": out, "reference": out, "sft": out}
        elif workload.kind == "dpo":
            folders |= {"policy": out, "reference": out}
        else:
            folders |= {workload.kind: out}
    return losses


def check_resume(workload: Workload, inputs: Path, work: Path, device: str) -> dict[str, Any]:
    """Losses of a stage that is broken off after two steps and computed again, against those of one that is not."""
    spec = workload.spec(str(inputs)) | {"runtime": {"device": device, "checkpoint_minutes": 0}}
    whole = ours.main(spec)["losses"]

    class InterruptingLog(supervised.MetricsLog):
        """A log at whose third line the stage is broken off."""

        def append_step(self, step: int, *others: Any) -> None:
            """Write a line, or break off."""
            if step == 2:
                raise KeyboardInterrupt
            super().append_step(step, *others)

    spec |= {"out": str(work)}
    with _replace_attribute(supervised, "MetricsLog", InterruptingLog):
        try:
            ours.main(spec)
        except KeyboardInterrupt:
            pass
        else:
            return {"resumed": {"failed": "the stage was not broken off", "right": False}}
    return {"resumed": _compare(ours.main(spec)["losses"], whole, LIMITS["float32"])}


def check_memory_settings(workload: Workload, inputs: Path, device: str) -> dict[str, Any]:
    """Losses and peak memory of a workload by each setting that saves memory, against those without."""
    figures: dict[str, Any] = {}
    plain: Sequence[float] = ()
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "activation_checkpointing": ({"activation_checkpointing": True}, {}),
        "offload_optimizer": ({"offload_optimizer": True}, {}),
        "adamw-8bit": ({}, {"optimizer": "adamw-8bit"}),
    }
    for name, (runtime, stage_settings) in settings.items():
        spec = replace(workload, runtime={"device": device} | runtime).spec(str(inputs))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            losses = ours.main(spec | {"stage_settings": {"learning_rate": 1e-4} | stage_settings})["losses"]
        except Exception as error:  # bitsandbytes may not be there
            figures[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}", "right": False}
            continue
        plain = plain or losses
        figures[name] = _compare(losses, plain, LIMITS["bfloat16"])
        if device == "cuda":
            figures[name]["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def _make_mistral(like: Path, work: Path) -> Path:
    """Write a small Mistral whose window is shorter than its rows, with the tokenizer of another model."""
    from mixpo.models.folders import load_tokenizer

    folder = work / "mistral"
    tokenizer = load_tokenizer(like / "model")
    config = MistralConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        sliding_window=WINDOW,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    MistralForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "summary.json").write_text("{}", encoding="utf8")
    return folder


@contextmanager
def _replace_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
