"""Several processes that train one model: each computes a share of the batch, and all take the same step.

Start them with `accelerate launch` or `torchrun`, which describe the group in the environment; without them there is one process.
"""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sharding import is_shared


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
        """Replace each gradient by its mean over the processes, and return the means of `scalars` (n,).

        A parameter that some processes did not use counts as zero there; one that none used, as those of an expert whose turn it is not, keeps none
        and is not sent. The gradients of shared parameters are means already.
        """
        if self.count == 1:
            return scalars
        trained = [parameter for parameter in parameters if not is_shared(parameter)]
        used = scalars.new_tensor([float(p.grad is not None) for p in trained])
        dist.all_reduce(used)
        trained = [p for p, count in zip(trained, used.tolist(), strict=True) if count]
        joined = torch.cat([*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained), scalars])
        dist.all_reduce(joined)
        joined /= self.count
        *means, scalars = joined.split([*(p.numel() for p in trained), len(scalars)])
        for parameter, mean in zip(trained, means, strict=True):
            parameter.grad = mean.view_as(parameter)
        return scalars


ALONE = Workers()
_CPU = torch.device("cpu")
_PATIENCE = timedelta(days=1)


@contextmanager
def joined_workers(device: torch.device = _CPU) -> Generator[Workers]:
    """Join the group that the environment describes (gloo on the CPU, nccl with CUDA) and leave it at the end, or be alone.

    With CUDA each process of a machine takes the device of its number there. One may wait for another as long as a full disk or a picture takes.
    A process that ends inside a group may be aborted by the threads of its connections.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if device == torch.device("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Workers(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
