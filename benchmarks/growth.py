"""One point of a growth curve, with random weights and tokens: `python -m benchmarks.growth SPEC`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.mathematics import forward_flops
from benchmarks.worker import median_seconds, run_worker
from mixpo.data.branches import BranchBatch, count_tokens_per_prompt, pack_branches, split_into_microbatches
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network
from mixpo.models.sampling import count_cacheable_tokens, sample_completions
from mixpo.training.parallel import StageProcesses
from mixpo.training.runtime import Runtime
from mixpo.training.step import Microbatch, OptimizerSettings, make_optimizer, take_optimizer_step

REPEATS = 3
"""Timed repetitions, after one that is not timed."""


@dataclass(frozen=True)
class Point:
    """Sizes of one update, or of one call that samples."""

    prompt: int = 128
    """Tokens of every prompt."""
    completion: int = 128
    """Tokens of every completion."""
    batch: int = 8
    k: int = 2
    """Completions of a prompt."""
    vocabulary: int = 49_152
    width: int = 256
    layers: int = 8
    precision: str = "bfloat16"

    def config(self) -> LlamaConfig:
        """Config of the model: heads of 64, intermediate size three times the width."""
        heads = self.width // 64
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )


AXES: dict[str, list[Point]] = {
    "prompt": [Point(prompt=tokens) for tokens in (64, 128, 256, 512, 1024, 2048)],
    "completion": [Point(completion=tokens) for tokens in (32, 64, 128, 256, 512)],
    "batch": [Point(batch=rows) for rows in (2, 4, 8, 16, 32)],
    "vocabulary": [Point(vocabulary=size) for size in (4096, 16_384, 49_152, 131_072, 262_144)],
    "k": [Point(k=k) for k in (1, 2, 4, 8, 16)],
    "width": [Point(width=width) for width in (128, 256, 512, 1024)],
    "layers": [Point(layers=layers) for layers in (4, 8, 16, 32)],
}
"""Points of each axis: one size grows, the others are constant."""


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the median seconds of an update on all completions' log-probs, or of sampling them, and its FLOPs."""
    point = Point(**spec["point"])
    device = Runtime().set_up_processes().device
    torch.manual_seed(0)
    model = LlamaForCausalLM(point.config()).to(device)
    lm = LanguageModel(Network(model, precision=point.precision), None, end_token=-1)  # type: ignore[arg-type]
    prompts = torch.randint(point.vocabulary, (point.batch, point.prompt)).tolist()
    completions = torch.randint(point.vocabulary, (point.batch, point.k, point.completion)).tolist()
    optimizer = make_optimizer(model.parameters(), OptimizerSettings(learning_rate=1e-6))
    work = (
        _make_update(lm, optimizer, prompts, completions)
        if spec["kind"] == "update"
        else _make_sampling(lm, point, prompts)
    )
    seconds = median_seconds(work, repeats=REPEATS, untimed=1)
    rows = [(point.prompt, [point.completion] * point.k)] * point.batch
    passes = 3 if spec["kind"] == "update" else 1
    flops = passes * forward_flops(rows, point.config(), predicts=True)
    return {**asdict(point), "seconds": seconds, "flops": flops}


def _make_update(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, prompts: list[list[int]], completions: list[list[list[int]]]
) -> Callable[[], object]:
    """Make a function that takes one optimizer step on the log-probs of all completions."""
    lengths, budget = count_tokens_per_prompt(prompts, completions), Runtime().microbatch_tokens
    processes = StageProcesses(lm.device)

    def pack(rows: list[int]) -> Microbatch:
        batch = pack_branches([prompts[row] for row in rows], [completions[row] for row in rows])
        return Microbatch(batch.to(lm.device), rows)

    def loss(batch: BranchBatch, rows: list[int]) -> Any:
        return -lm(batch, "logprobs").sum(), {}

    def work() -> None:
        lm.train()
        take_optimizer_step(
            optimizer,
            map(pack, split_into_microbatches(lengths, budget)),
            loss,
            loss_divisor=sum(lengths),
            max_grad_norm=1.0,
            learning_rate=1e-6,
            processes=processes,
        )

    return work


def _make_sampling(lm: LanguageModel, point: Point, prompts: list[list[int]]) -> Callable[[], object]:
    """Make a function that samples the completions of all prompts."""
    budget = count_cacheable_tokens(lm, Runtime().sampling_bytes)
    return lambda: sample_completions(lm, prompts, k=point.k, max_tokens=point.completion, seed=0, token_budget=budget)


if __name__ == "__main__":
    run_worker(main)
