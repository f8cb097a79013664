"""Gradients: effect of one DPO step on both completions of a pair (Theorem 1 and Corollary 1 of the paper)."""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.algorithms.preference import dpo_gradients
from mixpo.data.branches import pack_branches
from mixpo.data.splits import COMPARISON_SEED, draw_subset
from mixpo.models.language_model import LanguageModel
from mixpo.models.scoring import compute_sequence_logprobs
from mixpo.settings import Settings
from mixpo.stages.rows import read_pairs, write_table
from mixpo.stages.stage import Part, PolicyStage, Stage
from mixpo.training.job import StageJob
from mixpo.training.record import make_progress_reporter
from mixpo.training.resumable_work import ResumableWork


class GradientsSettings(Settings):
    """Settings of gradient measurements: the number of pairs of each part."""

    pairs: int = pydantic.Field(0, ge=0)
    """Pairs of each part; 0 measures none."""


class Gradients(Stage):
    """Stage of a DPO model's gradients in `gradients.parquet`, one row a pair, computed in float32.

    `log_x_chosen`, `log_x_rejected`: log(pi / pi_ref) of both completions (x_w and x_l of Theorem 1). `by_chosen`,
    `by_rejected`: dL/dx_w and dL/dx_l by automatic differentiation of the DPO loss. `chosen_chosen`,
    `rejected_rejected`, `chosen_rejected`: inner products of the gradients of both log-probs over all weights, from
    which the effect of a small step on both follows.
    """

    cuts_weights = False  # gradients of single pairs are over all weights

    policy: PolicyStage
    """The DPO model."""
    reference: PolicyStage
    pairs: Part
    beta: float
    count: int = pydantic.Field(ge=1)
    """Number of pairs with different completions, the same ones at every seed."""
    max_completion_tokens: int

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Compute the gradients of a DPO model on each pair and write `gradients.parquet`."""
        lm = job.load_trainable_policy(input_paths["policy"])
        reference = job.load_policy(input_paths["reference"])
        pairs = read_pairs(input_paths["pairs"], lm, max_completion_tokens=self.max_completion_tokens)
        selected = draw_subset(range(len(pairs.prompts)), self.count, COMPARISON_SEED)
        prompts, completions = [pairs.prompts[row] for row in selected], [pairs.completions[row] for row in selected]
        resumable = ResumableWork(job)
        reference_logprobs = resumable.score_in_portions(
            "reference", compute_sequence_logprobs, reference, prompts, completions
        )

        def measure_gradients(row: int) -> dict[str, float]:
            """The row in `gradients.parquet`, as columns by name, of a pair."""
            logprobs, (chosen_gradient, rejected_gradient) = _compute_logprob_gradients(
                lm, prompts[row], completions[row]
            )
            log_x = torch.tensor(logprobs, dtype=torch.float64) - reference_logprobs[row]
            by_chosen, by_rejected = dpo_gradients(*log_x, beta=self.beta)
            return {
                "log_x_chosen": float(log_x[0]),
                "log_x_rejected": float(log_x[1]),
                "by_chosen": by_chosen,
                "by_rejected": by_rejected,
                "chosen_chosen": float(chosen_gradient @ chosen_gradient),
                "rejected_rejected": float(rejected_gradient @ rejected_gradient),
                "chosen_rejected": float(chosen_gradient @ rejected_gradient),
            }

        def measure_portion(rows: list[int]) -> list[dict[str, float]]:
            """Rows of `gradients.parquet`, every process some of them."""
            own = job.processes.select_own_rows(rows)
            measured = job.processes.gather({row: measure_gradients(row) for row in own})
            for row in rows:
                job.cost.add_trained_tokens(lm, 2 * len(prompts[row]) + sum(map(len, completions[row])))
            columns = {row: columns for part in measured for row, columns in part.items()}
            return [columns[row] for row in rows]

        indices, size = range(len(prompts)), job.processes.count
        portions = [indices[first : first + size] for first in indices[::size]]
        advance = make_progress_reporter(len(prompts))
        rows = resumable.compute_rows("pairs", portions, measure_portion, report_finished=advance)
        if job.processes.is_main_process:
            write_table(job.out / "gradients.parquet", rows)
        job.finish_stage(pairs=len(rows))


def _compute_logprob_gradients(
    lm: LanguageModel, prompt: list[int], completions: list[list[int]]
) -> tuple[list[float], list[Tensor]]:
    """Log-prob of each completion of a prompt in nats, and its gradient over all weights as one vector."""
    lm.train()
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    logprobs, gradients = [], []
    for completion in completions:
        logprob = lm(pack_branches([prompt], [[completion]]).to(lm.device), "logprobs").sum()
        logprobs.append(float(logprob.detach()))
        parts = torch.autograd.grad(logprob, parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return logprobs, gradients
