"""Speed of the machine: FLOP/s of matrix products at a model's shapes, and memory bandwidth.

`python -m benchmarks.machine SPEC` prints one line of JSON.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.worker import median_seconds, run_worker

ROWS = 2048
"""Rows of a matrix product, as of a microbatch."""
REPEATS = 15


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure median FLOP/s and bytes/s."""
    config = AutoConfig.from_pretrained(Path(spec["inputs"]) / "models" / spec["model"] / "model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, spec["precision"])
    width, inner = config.hidden_size, config.intermediate_size
    key = width * config.num_key_value_heads // config.num_attention_heads
    shapes = [(width, width)] * 2 + [(width, key)] * 2 + [(width, inner)] * 2 + [(inner, width)]
    products = [
        (torch.randn(ROWS, a, device=device, dtype=dtype), torch.randn(b, a, device=device, dtype=dtype))
        for a, b in shapes
    ]
    flops = sum(2 * ROWS * a * b for a, b in shapes)
    seconds = median_seconds(
        lambda: [torch.nn.functional.linear(x, weight) for x, weight in products], repeats=REPEATS, untimed=2
    )
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    copied = median_seconds(lambda: target.copy_(source), repeats=REPEATS, untimed=2)
    return {
        "matmul_flops": flops / seconds,
        "bandwidth": 2 * source.nbytes / copied,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    run_worker(main)
