"""The training loop: one straight line from step to step, with an exact resume.

All randomness of a step (samples, noise, dropout) comes from `generator_for(seed, step)`, so a run that was killed and resumed takes the very
steps of the uninterrupted one, and there is no random state to save.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, load_newest, save
from .workers import ALONE, Workers

LossAt = Callable[[int], Mapping[str, Tensor]]
"""Maps a step to its scalars; the one named "loss" is minimised, the others are logged."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to optimise.

    The learning rate warms up over `warmup` steps, stays at `lr`, and falls to zero over the last `cooldown` steps as a half cosine; a run may
    be lengthened as long as its cooldown has not begun.
    """

    steps: int
    lr: float
    warmup: int = 200
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 500
    log_every: int = 20

    def learning_rate(self, step: int) -> float:
        """The rate of 0-based `step`."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = (self.steps - step) / self.cooldown if self.cooldown else 1.0
        return self.lr * rising * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def generator_for(seed: int, step: int) -> torch.Generator:
    """The CPU generator that all randomness of one step comes from."""
    return torch.Generator("cpu").manual_seed((seed << 40) + step)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Sample numbers of a step, (batch_size,) int64: each of `count` samples once per epoch, in an order that differs by epoch."""
    per_epoch = count // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed((seed << 40) + (1 << 39) + epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def train(model: nn.Module, loss_at: LossAt, config: TrainConfig, folder: Path, report: Callable[[str], None], workers: Workers = ALONE) -> nn.Module:
    """Train `model` in place until `config.steps`, continuing from the newest whole checkpoint in `folder` when there is one.

    Args:
        model: holds every parameter to be trained, float32.
        loss_at: computes the loss of a step with `model`.
        config: how to optimise.
        folder: receives checkpoints and `losses.jsonl`.
        report: called with a line of text every `config.log_every` steps.
        workers: the processes that train together; each one's `loss_at` sees its own share of the batch.

    Returns:
        A copy of `model` that holds the exponential moving average of its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    first = 0
    found = load_newest(folder)
    if found is not None:
        first = found.step
        model.load_state_dict(found.model)
        average = found.average
        _restore_optimizer(optimizer, parameters, found.optimizer)
    log = folder / "losses.jsonl"
    if workers.writes:
        keep_log_until(log, first)
    sums: dict[str, float] = {}
    started, seen = time.monotonic(), 0
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        scalars = loss_at(step)
        scalars["loss"].backward()
        workers.average_gradients(parameters.values())
        norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model.state_dict(), min(config.ema_decay, (1 + step) / (10 + step)))
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        seen += 1
        if workers.writes and ((step + 1) % config.log_every == 0 or step + 1 == config.steps):
            means = {name: round(total / seen, 5) for name, total in sums.items()}
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, **means}) + "\n")
            report(f"step {step + 1}/{config.steps} {means} {(time.monotonic() - started) / seen:.3f} s a step")
            sums, seen, started = {}, 0, time.monotonic()
        if workers.writes and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            state = {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}
            save(folder, Checkpoint(step + 1, dict(model.state_dict()), average, state, asdict(config)))
    return _with_weights(model, average)


def update_average(average: dict[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """Move `average` toward `current` in place: average ← decay·average + (1 − decay)·current."""
    with torch.no_grad():
        for name, value in current.items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
            else:
                average[name].copy_(value)


def keep_log_until(log: Path, step: int) -> None:
    """Drop the lines of `log` that a resumed run will write again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in lines))


def _restore_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        prefix = f"{name}."
        keys: Iterable[str] = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: state[prefix + key].clone() for key in keys}


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = deepcopy(model)
    other.load_state_dict(weights)
    return other.eval().requires_grad_(False)
