"""SFT: supervised fine-tuning on demonstrations, loss on completion tokens only."""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.data.branches import BranchBatch
from mixpo.data.sources import read_demonstration_rows
from mixpo.data.tokens import tokenize_row
from mixpo.models.language_model import branch_logprobs
from mixpo.models.loading import Lora, add_lora, load_policy, save_model
from mixpo.stages.rows import note_truncated
from mixpo.stages.stage import Seeded, Stage, finish, model_in
from mixpo.training.checkpoint import Checkpoint, Trainable
from mixpo.training.health import loss_alarms, mean_of_last, tell
from mixpo.training.record import Cost, Metrics
from mixpo.training.runtime import Runtime
from mixpo.training.step import Sums, make_optimizer, remedies
from mixpo.training.supervised import SupervisedSettings, steps_of, supervised


class SFTSettings(Seeded, SupervisedSettings):
    """Supervised fine-tuning."""

    learning_rate: float = pydantic.Field(5e-5, gt=0)
    batch_size: int = pydantic.Field(16, ge=1)
    warmup_steps: int = pydantic.Field(500, ge=0)
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    """A longer completion is cut, and then has no end token."""
    lora: Lora | None = None


class SFT(Stage, SFTSettings):
    """Minimises the mean negative log-likelihood of a batch's completion tokens, end tokens included."""

    base: Stage
    data: Stage

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write `model/`."""
        device, cost = runtime.start(), Cost()
        torch.manual_seed(self.seed)
        lm = load_policy(model_in(inputs["base"]), device=device, precision=self.precision)
        if self.lora:
            add_lora(lm, self.lora)
        rows = read_demonstration_rows(inputs["data"] / "demonstrations.parquet")
        tokens = [
            tokenize_row(lm.tokenizer, row.prompt, [row.completion], limit=self.max_completion_tokens) for row in rows
        ]
        prompts, completions = [prompt for prompt, _ in tokens], [completions for _, completions in tokens]
        truncated = sum(not lm.has_ended(completion[0]) for completion in completions)
        note_truncated("demonstrations", truncated, len(rows), self.max_completion_tokens)
        optimizer = make_optimizer(lm.model.parameters(), self)
        checkpoint = Checkpoint(
            out, {"model": Trainable(lm.model), "optimizer": optimizer}, every_minutes=runtime.checkpoint_minutes
        )
        first, spent = checkpoint.resume()
        cost.resume(spent)
        log, total = Metrics(out, resumed_at=first), steps_of(len(rows), self)

        def loss(batch: BranchBatch, rows: list[int]) -> tuple[Tensor, Sums]:
            logprobs = branch_logprobs(lm, batch)
            cost.trained(lm.model, batch.tokens)
            return -logprobs.sum(), {}

        for step, metrics in supervised(
            lm,
            optimizer,
            prompts,
            completions,
            loss,
            count=lambda rows: sum(len(completions[row][0]) for row in rows),
            settings=self,
            seed=self.seed,
            first_step=first,
            microbatch_tokens=runtime.microbatch_tokens,
        ):
            log.add(step, total, metrics)
            checkpoint.maybe_write(step + 1, cost.counts())

        digest, log_rows = save_model(lm, model_in(out)), log.rows()
        tips = remedies(total - 1, total=total, settings=self, precision=self.precision)
        finish(
            out,
            cost,
            model=digest,
            rows=len(rows),
            steps=total,
            alarms=tell(loss_alarms(log_rows, tips)),
            loss=mean_of_last(log_rows, "loss"),
            truncated=truncated,
        )
        checkpoint.remove()
