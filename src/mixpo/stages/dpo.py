"""DPO: direct preference optimization on any pairs, from any start, against any reference (Rafailov et al. 2023)."""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.algorithms.preference import dpo_loss, implicit_rewards
from mixpo.data.branches import BranchBatch
from mixpo.data.splits import COMPARED, draw
from mixpo.models.language_model import LanguageModel, branch_logprobs
from mixpo.models.loading import Lora, add_lora, freeze, load_policy, model_digest, save_model
from mixpo.models.sampling import sample
from mixpo.models.scoring import sequence_logprobs
from mixpo.stages.rows import Pairs, read_pairs, sampler_name
from mixpo.stages.stage import Part, Seeded, Stage, finish, model_in
from mixpo.training.checkpoint import Checkpoint, Trainable
from mixpo.training.health import mean_of_last, policy_alarms, tell
from mixpo.training.portions import Portions
from mixpo.training.record import Cost, Metrics, append_jsonl, trim_jsonl
from mixpo.training.runtime import Runtime
from mixpo.training.step import Sums, make_optimizer
from mixpo.training.supervised import SupervisedSettings, steps_of, supervised

CHECKED_PAIRS = 8
"""Kept log-probs of so many pairs are compared with a forward pass before they are used."""
SAMPLED_PROMPTS = 8
"""Completions of so many training prompts are drawn to be looked at."""
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.1}
"""How far a kept log-prob may be from a forward pass, in nats a token."""


class DPOSettings(Seeded, SupervisedSettings):
    """Direct preference optimization."""

    beta: float = pydantic.Field(0.1, gt=0)
    """Scale of the implicit reward."""
    learning_rate: float = pydantic.Field(5e-6, gt=0)
    batch_size: int = pydantic.Field(16, ge=1)
    warmup_steps: int = pydantic.Field(100, ge=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    samplings: int = pydantic.Field(4, ge=0)
    """So many times during training, completions of a few prompts are drawn and written to `samples.jsonl`."""
    lora: Lora | None = None


class DPO(Stage, DPOSettings):
    """Minimises equation 2 of the paper. The reference is a named stage, never the base model by accident."""

    policy: Stage
    reference: Stage
    pairs: Part

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write `model/`."""
        device, cost = runtime.start(), Cost()
        torch.manual_seed(self.seed)
        lm = load_policy(model_in(inputs["policy"]), device=device, precision=self.precision)
        pairs = read_pairs(inputs["pairs"], lm, max_completion_tokens=self.max_completion_tokens)
        portions = Portions(out, cost)
        reference = _reference_logprobs(self, inputs, lm, pairs, portions, runtime)
        if self.lora:
            add_lora(lm, self.lora)
        optimizer = make_optimizer(lm.model.parameters(), self)
        checkpoint = Checkpoint(
            out, {"model": Trainable(lm.model), "optimizer": optimizer}, every_minutes=runtime.checkpoint_minutes
        )
        first, spent = checkpoint.resume()
        trim_jsonl(out / "samples.jsonl", first)
        cost.resume(spent)
        log, total = Metrics(out, resumed_at=first), steps_of(len(pairs.prompts), self)

        def loss(batch: BranchBatch, rows: list[int]) -> tuple[Tensor, Sums]:
            logprobs = branch_logprobs(lm, batch)
            cost.trained(lm.model, batch.tokens)
            chosen, rejected = logprobs.sum(dim=-1).unbind(dim=1)
            chosen_reference, rejected_reference = reference[rows].to(device).unbind(dim=1)
            losses = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, beta=self.beta)
            with torch.no_grad():
                chosen_reward = implicit_rewards(chosen, chosen_reference, beta=self.beta)
                rejected_reward = implicit_rewards(rejected, rejected_reference, beta=self.beta)
                number = torch.tensor(len(rows))
                metrics = {
                    "accuracy": ((chosen_reward > rejected_reward).sum(), number),
                    "margin": ((chosen_reward - rejected_reward).sum(), number),
                    "chosen_reward": (chosen_reward.sum(), number),
                    "rejected_reward": (rejected_reward.sum(), number),
                    "chosen_logprob": (chosen.sum(), number),
                    "rejected_logprob": (rejected.sum(), number),
                }
            return losses.sum(), metrics

        samplings = {total * part // self.samplings for part in range(1, self.samplings + 1)} if self.samplings else {}
        looked_at = draw(range(len(pairs.prompts)), SAMPLED_PROMPTS, COMPARED)
        for step, metrics in supervised(
            lm,
            optimizer,
            pairs.prompts,
            pairs.completions,
            loss,
            count=len,
            settings=self,
            seed=self.seed,
            first_step=first,
            microbatch_tokens=runtime.microbatch_tokens,
        ):
            if step + 1 in samplings:
                metrics = {**metrics, **_look(self, lm, looked_at, pairs, out, step, runtime, cost)}
            log.add(step, total, metrics)
            checkpoint.maybe_write(step + 1, cost.counts())

        digest = save_model(lm, model_in(out))
        rows = log.rows()
        figures = {name: mean_of_last(rows, name) for name in ("loss", "accuracy", "margin")}
        remedies = {
            "end_rate": f"a higher max_completion_tokens (now {self.max_completion_tokens}), a lower learning_rate "
            f"(now {self.learning_rate:g}) or a higher beta (now {self.beta:g})"
        }
        alarms = tell(policy_alarms(rows, remedies))
        figures["reference_seconds"] = portions.seconds["reference"]
        left = {"truncated": pairs.truncated, "identical": pairs.identical}
        finish(out, cost, model=digest, pairs=len(pairs.prompts), **left, steps=total, alarms=alarms, **figures)
        checkpoint.remove()
        portions.remove()


def _reference_logprobs(
    stage: DPO, inputs: Mapping[str, Path], lm: LanguageModel, pairs: Pairs, portions: Portions, runtime: Runtime
) -> Tensor:
    """Sequence log-probs of all pairs under the reference, [pairs, 2].

    Free where the reference itself drew the pairs: those kept from sampling are used, after a few of them were
    compared with a forward pass. Computed once otherwise.
    """
    policy_folder, reference_folder = model_in(inputs["policy"]), model_in(inputs["reference"])
    digest = model_digest(reference_folder)
    same = digest == model_digest(policy_folder)
    reference = lm if same else freeze(load_policy(reference_folder, device=lm.device, precision=stage.precision))
    kept = pairs.logprobs if pairs.sampler == sampler_name(digest, stage.precision) else None
    checked = draw(range(len(pairs.prompts)), None if kept is None else CHECKED_PAIRS, COMPARED)
    prompts, completions = [pairs.prompts[row] for row in checked], [pairs.completions[row] for row in checked]
    budget = runtime.microbatch_tokens
    computed = portions.read("reference", sequence_logprobs, reference, prompts, completions, token_budget=budget)
    if kept is None:
        return computed
    lengths = torch.tensor([[len(completion) for completion in branches] for branches in completions])
    difference = ((torch.tensor(kept)[checked] - computed).abs() / lengths).max()
    if float(difference) > AGREEMENT[stage.precision]:
        portions.remove()  # the samples may be others when this is tried again
        raise RuntimeError(
            f"log-probs kept from sampling differ from a forward pass of the reference by {float(difference):.3g} nats "
            f"a token; expected at most {AGREEMENT[stage.precision]}; delete the samples' folder to draw them again"
        )
    return torch.tensor(kept)


def _look(
    stage: DPO, lm: LanguageModel, rows: list[int], pairs: Pairs, out: Path, step: int, runtime: Runtime, cost: Cost
) -> dict[str, float]:
    """Draw completions of a few training prompts, so that a policy that stops ending its completions is seen."""
    prompts = [pairs.prompts[row] for row in rows]
    drawn = sample(
        lm,
        prompts,
        k=1,
        max_tokens=stage.max_completion_tokens,
        seed=stage.seed,
        token_budget=runtime.sampling_tokens,
    )
    completions = [row.completions[0] for row in drawn]
    cost.sampled(lm.model, sum(map(len, completions)), sum(map(len, prompts)))
    texts = [lm.read_text(completion) for completion in completions]
    append_jsonl(
        out / "samples.jsonl",
        [
            {"step": step, "prompt": pairs.untokenised[row], "completion": text}
            for row, text in zip(rows, texts, strict=True)
        ],
    )
    return {
        "sampled_end_rate": sum(map(lm.has_ended, completions)) / len(completions),
        "sampled_tokens": sum(map(len, completions)) / len(completions),
    }
