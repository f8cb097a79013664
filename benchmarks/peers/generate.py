"""Sampling with transformers: `generate` on a left-padded batch, or its continuous batching."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.worker import answer


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one call; tokens are counted to the end token, as ours are."""
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
    how = GenerationConfig(
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
        outputs = model.generate_batch(prompts, generation_config=how)
        seconds = time.perf_counter() - started
        drawn = [list(output.generated_tokens) for output in outputs.values()]
    else:
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        started = time.perf_counter()
        with torch.no_grad():
            output = model.generate(**batch, generation_config=how)
        seconds = time.perf_counter() - started
        drawn = output[:, batch["input_ids"].shape[1] :].tolist()
    tokens = sum(_until_end(row, tokenizer.eos_token_id) for row in drawn)
    return {"seconds": seconds, "rows": len(texts), "tokens": tokens, "losses": []}


def _until_end(row: list[int], end: int) -> int:
    return row.index(end) + 1 if end in row else len(row)


if __name__ == "__main__":
    answer(main)
