"""A small network trained on a toy task, with which the loop is tested."""

from pathlib import Path

import torch
from torch import Tensor, nn
from tu_diffuse.training.loop import batch_indices, generator_for, train
from tu_diffuse.training.train_config import TrainConfig

CONFIG = TrainConfig(steps=12, lr=0.05, warmup=3, cooldown=4, save_every=4, log_every=2, seed=5)
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def run(folder: Path, config: TrainConfig = CONFIG, stop_at: int | None = None, told_at: int | None = None) -> tuple[nn.Module, nn.Module]:
    """Train a small network to predict a noisy function of its input.

    `stop_at` kills the run at the start of that step, `told_at` tells it during that step to stop after it.
    """
    torch.manual_seed(0)
    last: list[int] = []
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_at(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        last[:] = [step]
        generator = generator_for(config.seed, step)
        rows = DATA[batch_indices(len(DATA), 8, config.seed, step)]
        target = rows.sum(1, keepdim=True).sin() + 0.1 * torch.randn(8, 1, generator=generator)
        return {"loss": (model(rows) - target).square().mean()}

    return model, train(model, loss_at, config, folder, lambda line: None, should_stop=lambda: last == [told_at])
