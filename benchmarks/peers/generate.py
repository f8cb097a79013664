"""Sampling with transformers: `generate` on a left-padded batch, or continuous batching."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.worker import run_worker


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds of one call; tokens are counted up to the end token, as for mixpo."""
    inputs, settings = Path(spec["inputs"]), spec["settings"]
    folder = inputs / "models" / spec["model"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, settings.get("dtype", spec["precision"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    texts = json.loads((inputs / "rows" / spec["name"] / "prompts.json").read_text(encoding="utf8"))
    config = GenerationConfig(
        max_new_tokens=spec["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    if settings.get("continuous"):
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        started = time.perf_counter()
        outputs = model.generate_batch(prompts, generation_config=config)
        seconds = time.perf_counter() - started
        completions = [list(output.generated_tokens) for output in outputs.values()]
    else:
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        started = time.perf_counter()
        with torch.no_grad():
            output = model.generate(**batch, generation_config=config)
        seconds = time.perf_counter() - started
        completions = output[:, batch["input_ids"].shape[1] :].tolist()
    tokens = sum(_count_tokens(row, tokenizer.eos_token_id) for row in completions)
    return {"seconds": seconds, "rows": len(texts), "tokens": tokens, "losses": []}


def _count_tokens(completion: list[int], end: int) -> int:
    """Count the tokens of a completion up to its end token."""
    return completion.index(end) + 1 if end in completion else len(completion)


if __name__ == "__main__":
    run_worker(main)
