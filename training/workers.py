"""Several processes that train one model: each computes a share of the batch, and all take the same step.

Start them with `accelerate launch` or `torchrun`, which describe the group in the environment; without them there is one process.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """`count` processes, of which this is number `rank`; number 0 writes checkpoints and logs."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """This process's rows of a batch."""
        return slice(self.rank, None, self.count)

    def average(self, parameters: Iterable[nn.Parameter], scalars: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes, and return the means of `scalars` (n,); one message for all."""
        if self.count == 1:
            return scalars
        gradients = [p.grad for p in parameters if p.grad is not None]
        joined = torch.cat([*(gradient.flatten() for gradient in gradients), scalars])
        dist.all_reduce(joined)
        joined /= self.count
        *means, scalars = joined.split([*(gradient.numel() for gradient in gradients), len(scalars)])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return scalars


ALONE = Workers()


def join_workers() -> Workers:
    """Join the group that the environment describes (gloo on the CPU, nccl with CUDA), or be alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Workers(int(os.environ.get("RANK", "0")), count)
