"""The training loop: one straight line from step to step, with an exact resume.

All randomness of a step (samples, noise, dropout) comes from `generator_for(seed, step)`, so a run that was killed and resumed takes the very
steps of the uninterrupted one, and there is no random state to save.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TrainingError, UsageError
from ..pipeline.staging import sync, write_file
from .checkpoints import Checkpoint, load_newest, save
from .optimizers import make_optimizer, optimizer_state, restore_optimizer
from .posthoc import drop_snapshots_after, power_averages, update_power_averages, write_snapshots
from .saving import save_or_wait, wait_for_room
from .sharding import all_like, is_shared, number, optimizer_like, part, whole
from .tallies import Tally, add, means, pairs_of
from .train_config import TrainConfig, check_same_run
from .workers import ALONE, Workers

LossAt = Callable[[int], Mapping[str, Tensor]]
"""Maps a micro-step to its scalars, the same names at every step: "loss", (), is minimised; the others, () or a sum and a count (2,), are logged."""

NAN_STEPS = 3  # steps in a row whose loss or gradient is not finite before a run gives up


@dataclass(frozen=True)
class Logged:
    """One line of the loss log: the means over the steps since the last one, and the learning rate of this one ("lr")."""

    step: int
    steps: int
    scalars: dict[str, float]
    seconds_a_step: float

    def __str__(self) -> str:
        return f"step {self.step}/{self.steps} {self.scalars} {self.seconds_a_step:.3f} s a step"


class InterruptedRunError(Exception):
    """The run was asked to stop and has saved a checkpoint."""


def _never() -> bool:
    return False


def _unobserved(step: int, weights: Mapping[str, Tensor]) -> None:
    """Nothing is done after a step."""


def generator_for(seed: int, step: int) -> torch.Generator:
    """The CPU generator that all randomness of one step comes from."""
    return torch.Generator("cpu").manual_seed((seed << 40) + step)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Sample numbers of a step, (batch_size,) int64: each of `count` samples once per epoch, in an order that differs by epoch."""
    per_epoch = count // batch_size
    epoch, position = divmod(step, per_epoch)
    return epoch_order(count, seed, epoch)[position * batch_size : (position + 1) * batch_size]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` samples in an epoch, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed((seed << 40) + (1 << 39) + epoch))


def train(
    model: nn.Module,
    loss_at: LossAt,
    config: TrainConfig,
    folder: Path,
    report: Callable[[Logged | str], None],
    workers: Workers = ALONE,
    *,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = _never,
    observe: Callable[[int, Mapping[str, Tensor]], None] = _unobserved,
) -> nn.Module:
    """Train `model` in place until `config.steps`, continuing from the newest whole checkpoint in `folder` when there is one.

    Args:
        model: holds every parameter to be trained, float32; it may be shared among the workers (`sharding.shard`).
        loss_at: computes the loss of a micro-step with `model`; step · accumulate + k is the k-th of a step.
        config: how to optimise.
        folder: receives checkpoints, `losses.jsonl`, and in `averages` the snapshots of `posthoc`.
        report: called with a `Logged` every `config.log_every` steps, and with a line of text when something is amiss.
        workers: the processes that train together; each one's `loss_at` sees its own share of the batch.
        identity: what else makes this run the one that it is (data, model), JSON-compatible; a checkpoint of another is refused.
        resume: a run without a checkpoint is refused instead of begun.
        should_stop: asked after every step.
        observe: called after every step, by all workers, with the number of steps taken and the trained weights that a result would have; on a resume
            also for the step of the checkpoint, since the run may have been killed before it was called.

    Returns:
        A copy of `model`, or itself when it is shared, that holds the exponential moving average of its weights (the last ones with ema_decay None).

    Raises:
        UsageError: the checkpoints in `folder` are of another run, or with `resume` there is none.
        DataError: there are checkpoints, and all are torn.
        OutputError: the disk has no room for a checkpoint; the one before is whole.
        TrainingError: NAN_STEPS steps in a row were not finite; no checkpoint holds such values.
        InterruptedRunError: `should_stop` said so; a checkpoint of this very step is there.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.values(), config)
    scaler = torch.amp.GradScaler(next(iter(parameters.values())).device.type, enabled=config.loss_scaling)
    described = {**asdict(config), "betas": list(config.betas), "identity": dict(identity or {})}
    average = {} if config.ema_decay is None else {name: p.detach().clone() for name, p in parameters.items()}
    powers = {} if config.snapshot_every is None else power_averages(parameters)
    start = {} if config.snapshot_every is None else {name: p.to("cpu", copy=True) for name, p in whole(parameters, workers.writes).items()}
    first, tally = 0, Tally()
    found = load_newest(folder, report if workers.writes else None)
    if found is None and resume:
        raise UsageError(f"{folder.parent.name!r} has no checkpoint to resume; leave --resume out to begin the run.")
    if found is not None:
        check_same_run(found, config, described)
        first, tally = found.step, dict(found.tally)
        model.load_state_dict(all_like(found.model, parameters), strict=False)
        average = all_like(found.average, average)
        powers = all_like(found.power_averages, powers)
        restore_optimizer(optimizer, parameters, optimizer_like(found.optimizer, parameters), found.numbers)
        scaler.load_state_dict(found.scaler)
        if workers.writes:
            report(f"goes on from the checkpoint of step {first}")
    del found  # which holds whole tensors
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "losses.jsonl"
    if workers.writes:
        keep_log_until(log, first)
        drop_snapshots_after(folder / "averages", first)
        wait_for_room(folder, parameters, average | powers, first, config, report)
    if first:
        observe(first, average or parameters)
    times: list[float] = []
    bad, saved = 0, first
    for step in range(first, config.steps):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        told: list[Tensor] = []
        names: list[str] = []
        for micro in range(config.accumulate):
            scalars = loss_at(step * config.accumulate + micro)
            scaler.scale(scalars["loss"] / config.accumulate).backward()
            names = list(scalars)
            told.append(pairs_of(scalars))
        stop = torch.tensor([float(should_stop())], device=told[0].device)
        *averaged, stopping = workers.average(parameters.values(), torch.cat([torch.stack(told).sum(0).flatten(), stop])).tolist()
        scaler.unscale_(optimizer)
        length = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        norm = number(length)
        if norm > config.max_grad_norm:  # to multiply by 1 as well would read and write all gradients for nothing
            nn.utils.clip_grads_with_norm_(parameters.values(), config.max_grad_norm, length)
        loss = averaged[2 * names.index("loss")] / config.accumulate
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            bad = 0
            add(tally, [*names, "grad_norm"], [*averaged, norm, 1.0])
            if config.ema_decay is not None:
                update_average(average, parameters, min(config.ema_decay, (1 + step) / (10 + step)))
        elif config.loss_scaling and math.isfinite(loss) and scaler.get_scale() > 1:
            report(f"step {step + 1}: the gradient overflowed float16; the step was skipped and the scale of the loss is lowered")
        else:
            bad += 1
            report(f"step {step + 1}: the loss ({loss:g}) or its gradient is not finite; the step was skipped")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if bad == NAN_STEPS:
            raise TrainingError(
                f"{NAN_STEPS} steps in a row up to step {step + 1} were not finite; a lower learning rate, float32 or other data is needed; "
                f"the checkpoint of step {saved} is whole."
            )
        update_power_averages(powers, parameters, step + 1)
        times.append(time.monotonic() - started)
        if workers.writes and ((step + 1) % config.log_every == 0 or step + 1 == config.steps):
            line = {**means(tally), "lr": config.learning_rate(step)}
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, **line}) + "\n")
            report(Logged(step + 1, config.steps, line, sum(times) / len(times)))
            tally.clear()
            times.clear()
        if config.snapshot_due(step + 1):
            averages_now = whole(powers, workers.writes)
            if workers.writes:
                save_or_wait(partial(write_snapshots, folder / "averages", averages_now, start, step + 1, described), step + 1, config, report)
            del averages_now
        last = step + 1 == config.steps or stopping > 0
        if last or (step + 1) % config.save_every == 0:
            saved = step + 1
            moments, numbers = optimizer_state(optimizer, parameters)
            tensors = [whole(named, workers.writes) for named in (parameters, average, powers, moments)]
            if workers.writes:
                if log.exists():
                    sync(log)  # no checkpoint is on the disk before the lines up to its step are
                state = Checkpoint(saved, *tensors, numbers=numbers, scaler=scaler.state_dict(), config=described, tally=dict(tally))
                save_or_wait(partial(save, folder, state), saved, config, report)
                del state
            del tensors, moments
        observe(step + 1, average or parameters)
        if stopping > 0 and step + 1 < config.steps:
            raise InterruptedRunError(f"stopped after step {step + 1} of {config.steps}")
    return _with_weights(model, average)


def update_average(average: dict[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """Move `average` toward `current` in place: average ← decay·average + (1 − decay)·current."""
    with torch.no_grad():
        for name, value in current.items():
            if value.is_floating_point():
                part(average[name]).lerp_(part(value), 1 - decay)
            else:
                average[name].copy_(value)


def keep_log_until(log: Path, step: int) -> None:
    """Drop the lines of `log` that a resumed run will write again, and a last one that was cut short."""
    if log.exists():
        try:
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{log.name} is not a log of losses ({error!s:.200}); remove it, or give the run another folder.") from error
        write_file(log, lambda path: path.write_text("".join(lines)))


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = model if any(map(is_shared, model.parameters())) else deepcopy(model)
    other.load_state_dict(weights, strict=False)
    return other.eval().requires_grad_(False)
