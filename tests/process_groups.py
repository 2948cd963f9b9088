"""Groups of processes that train together in tests: forked from one that has imported all, they find each other as under torchrun."""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.shards.index import index_shards
from tu_diffuse.training.config import make_config
from tu_diffuse.training.finetune import finetune, make_plan
from tu_diffuse.training.loop import InterruptedRunError, generator_for, train
from tu_diffuse.training.sharding import shard
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.training.workers import Workers, joined_workers
from unet_configs import random_unet

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tu_diffuse.training.finetune", "torch._dynamo"])


def together(count: int, work: Callable[..., None], *arguments: Any, ended: int = 0) -> None:
    """Run `work(workers, *arguments)` in `count` processes, which must all end with that code."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = [_FORKED.Process(target=_one, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for process in group:
        process.start()
    for process in group:
        process.join(400)
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    assert codes == [ended] * count


def _one(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined_workers() as workers:
        work(workers, *arguments)


@dataclass(frozen=True)
class Job:
    """A fine-tuning run: options beside those of every run, and the step after which it is killed or told to stop."""

    model: Path
    shards: str
    out: Path
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    killed_at: int | None = None
    told_at: int | None = None


def fine_tune(workers: Workers, jobs: list[Job]) -> None:
    """Do runs. Each process leaves how many bytes it held in its last step (held-0.json), and each validation its model (draft-2)."""
    for job in jobs:
        index = index_shards([job.shards])
        plan = make_plan(make_config({"shards": ["unused"], **job.options}), open_folder(job.model), index, range(len(index.samples)))
        steps: list[int] = []
        held: list[int] = []

        def should_stop(job: Job = job, steps: list[int] = steps, held: list[int] = held) -> bool:
            steps.append(1)
            held[:] = [held_bytes()]
            if len(steps) == job.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(steps) == job.told_at and workers.rank == workers.count - 1  # one is told, all stop

        def keep_draft(draft: Path, step: int, job: Job = job) -> None:
            shutil.copytree(draft, job.out / f"draft-{step}", dirs_exist_ok=True)

        try:
            finetune(plan, job.out, lambda event: None, workers=workers, should_stop=should_stop, draw_prompts=keep_draft)
        except InterruptedRunError:
            assert job.told_at is not None
        (job.out / f"held-{workers.rank}.json").write_text(json.dumps(held))


def held_bytes() -> int:
    """Bytes of the memory of all tensors that are reachable, each counted once; shared ones by this process's part."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def train_with_bad_steps(workers: Workers, out: Path) -> None:
    """Train a U-Net, shared when there are several processes, on rows of which the last gives no number at step 1 and overflows at step 3."""
    networks = nn.ModuleDict({"unets": nn.ModuleDict({"one": random_unet("sd1").train().requires_grad_()}), "text": nn.ModuleDict()})
    unet = networks["unets"]["one"]
    if workers.count > 1:
        shard(networks, torch.device("cpu"))
    lines: list[str] = []

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = generator_for(0, step)
        x, tokens, target = (torch.randn(shape, generator=generator)[workers.rows] for shape in ((2, 4, 8, 8), (2, 5, 24), (2, 4, 8, 8)))
        bad = torch.tensor([1.0, {1: math.nan, 3: 1e36}.get(step, 1.0)])[workers.rows]
        predicted = unet(x, torch.full((len(x),), 500.0), unet.text_keys_values(tokens))
        return {"loss": ((predicted - target).square().mean(dim=(1, 2, 3)) * bad).mean()}

    config = TrainConfig(steps=5, lr=1e-3, warmup=0, save_every=5, log_every=1, loss_scaling=True)
    train(networks, loss_at, config, out, lambda line: lines.append(str(line)), workers)
    (out / f"notes-{workers.rank}.json").write_text(json.dumps([line for line in lines if "skipped" in line]))
