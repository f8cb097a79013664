"""Data-parallel processes of one stage: who computes which rows, sums and exchanges, and the process that writes files.

Every process computes the whole stage, but of each set of rows only its share: a batch's gradients are summed over the
processes, completions and scores are exchanged, so that every process has all of them and takes the same decisions.
Only the main process writes files. How many processes there are changes nothing but rounding (and the random numbers
of adapters' dropout).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixpo.models.language_model import LanguageModel
from mixpo.models.samplers import Sampler, SamplingOptions
from mixpo.models.sampling import SampledCompletions, count_earlier_occurrences
from mixpo.training.sharding import gather_for_passes, get_local, shard_module

Value = TypeVar("Value")

BUCKET_NUMBERS = 1 << 24
"""Numbers of one sum over gradients: small tensors travel together, and the copy takes 64 MiB in float32."""


@dataclass(frozen=True)
class StageProcesses:
    """The processes that share a stage's rows, seen from one of them.

    With more than one, PyTorch's process group must be there (`Rendezvous.open_processes`), and what is said to be
    called by every process must be called by every one of them, in the same order.
    """

    device: torch.device
    """Device of this process."""
    rank: int = 0
    count: int = 1
    is_sharded: bool = False
    """Whether trained and frozen weights are cut over the processes, instead of copied to each."""

    @property
    def is_main_process(self) -> bool:
        """True for the process that writes the stage's files and reports to the listener."""
        return self.rank == 0

    def select_own_rows(self, rows: Sequence[int]) -> list[int]:
        """The rows, out of these, that this process computes."""
        return self.select_rows_of(self.rank, rows)

    def select_rows_of(self, rank: int, rows: Sequence[int]) -> list[int]:
        """The rows, out of these, that the process of a rank computes."""
        return list(rows[rank :: self.count])

    @property
    def gradient_factor(self) -> int:
        """Factor of a loss whose gradients are to be summed: where weights are cut, PyTorch takes the mean instead."""
        return self.count if self.is_sharded else 1

    def shard(self, module: nn.Module) -> None:
        """Cut the weights of a network, or of a head that trains with it, over the processes, if they are to be."""
        if self.is_sharded:
            shard_module(module, self.device, self.count)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank; called by every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        """Wait until every process has come here; called by every process."""
        self.gather(None)

    def take_from_main(self, compute: Callable[[], Value]) -> Value:
        """The result of `compute`, which the main process alone calls; called by every process."""
        return self.gather(compute() if self.is_main_process else None)[0]  # type: ignore[return-value]

    def compute_tensors(
        self, row_count: int, compute: Callable[[list[int]], Sequence[Tensor]], *, order: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Tensors with one entry a row, of which each process computes its share; called by every process.

        `compute` takes row indices and returns tensors [rows, ..., n], on the CPU; where n differs, entries are padded
        with 0. Rows are dealt in `order`, or as they are numbered.
        """
        rows = range(row_count) if order is None else order
        if self.count == 1:
            return list(compute(list(range(row_count))))
        own = sorted(self.select_own_rows(rows))
        parts = [part for part in self.gather((own, compute(own) if own else ())) if part[0]]
        results = []
        for index, first in enumerate(parts[0][1]):
            longest = max(tensors[index].shape[-1] for _, tensors in parts)
            result = first.new_zeros(row_count, *first.shape[1:-1], longest)
            for part_rows, tensors in parts:
                result[part_rows, ..., : tensors[index].shape[-1]] = tensors[index]
            results.append(result)
        return results

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the processes, in place; those that no process has stay None. Called by every process.

        The gradients of weights that are cut were summed by the backward pass, times `gradient_factor` as all are.
        """
        if self.count == 1:
            return
        parameters = [parameter for parameter in parameters if get_local(parameter) is parameter]
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)  # a sum of bytes is 0 again at 256 processes
        gradients = []
        for parameter, number in zip(parameters, present.tolist(), strict=True):
            if number:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        for bucket in _split_into_buckets(gradients):
            summed = torch.cat([gradient.flatten() for gradient in bucket]) / self.gradient_factor
            dist.all_reduce(summed)
            for gradient, part in zip(bucket, summed.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


class MultiProcessSampler:
    """A sampler whose prompts are dealt to the processes of a stage; every process receives all completions.

    Random numbers belong to the prompt, so who samples it changes nothing. Every process must call `draw`.
    """

    def __init__(self, sampler: Sampler, processes: StageProcesses) -> None:
        self.sampler, self.processes = sampler, processes
        self.policy: LanguageModel | None = None

    def load_policy(self, policy: LanguageModel) -> None:
        """Hand the policy to this process's own sampler."""
        self.policy = policy
        self.sampler.load_policy(policy)

    def draw(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> SampledCompletions:
        """Sample k completions of every prompt, each in a process. Raises RuntimeError before `load_policy`."""
        if self.policy is None:
            raise RuntimeError("no policy to sample from: call load_policy first")
        occurrences = options.get("occurrences") or count_earlier_occurrences(prompts)

        def draw_rows(rows: list[int]) -> list[Tensor]:
            """Tokens, mask, log-probs and ends of the completions of these prompts."""
            own_options: SamplingOptions = {**options, "occurrences": [occurrences[row] for row in rows]}
            sampled = self.sampler.draw([prompts[row] for row in rows], **own_options)
            return [sampled.tokens, sampled.mask, sampled.logprobs, sampled.ended]

        with gather_for_passes(self.policy.network):
            return SampledCompletions(*self.processes.compute_tensors(len(prompts), draw_rows))

    def close(self) -> None:
        """Close this process's own sampler."""
        self.sampler.close()


def _split_into_buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Yield tensors, in order, in lists of at most `BUCKET_NUMBERS` numbers; a larger tensor comes alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
