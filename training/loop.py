"""The training loop: one straight line from step to step, with an exact resume.

All randomness of a step (samples, noise, dropout) comes from `generator_for(seed, step)`, so a run that was killed and resumed takes the very
steps of the uninterrupted one, and there is no random state to save.
"""

import errno
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import OutputError, TrainingError, UsageError
from .checkpoints import Checkpoint, load_newest, save
from .workers import ALONE, Workers

LossAt = Callable[[int], Mapping[str, Tensor]]
"""Maps a micro-step to its scalars; the one named "loss" is minimised, the others are logged."""

Weights = dict[str, Tensor]
NAN_STEPS = 3  # steps in a row whose loss or gradient is not finite before a run gives up
_MAY_CHANGE = ("steps", "cooldown", "save_every", "log_every", "when_full")
_POLL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to optimise.

    The learning rate warms up over `warmup` steps, stays at `lr`, and falls to zero over the last `cooldown` steps as a half cosine; a run may
    be lengthened as long as its cooldown has not begun.

    Attributes:
        accumulate: micro-steps whose gradients are averaged into one step.
        ema_decay: of the averaged weights; None keeps no average, the result is then the last weights.
        when_full: what to do when the disk has no room for a checkpoint: "stop", or "wait" until there is.
    """

    steps: int
    lr: float
    warmup: int = 200
    cooldown: int = 0
    accumulate: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float | None = 0.999
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    when_full: Literal["stop", "wait"] = "stop"

    def learning_rate(self, step: int) -> float:
        """The rate of 0-based `step`."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = (self.steps - step) / self.cooldown if self.cooldown else 1.0
        return self.lr * rising * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


@dataclass(frozen=True)
class Logged:
    """One line of the loss log: the means over the steps since the last one."""

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
    should_stop: Callable[[], bool] = _never,
    observe: Callable[[int, Mapping[str, Tensor]], None] = _unobserved,
) -> nn.Module:
    """Train `model` in place until `config.steps`, continuing from the newest whole checkpoint in `folder` when there is one.

    Args:
        model: holds every parameter to be trained, float32.
        loss_at: computes the loss of a micro-step with `model`; step · accumulate + k is the k-th of a step.
        config: how to optimise.
        folder: receives checkpoints and `losses.jsonl`.
        report: called with a `Logged` every `config.log_every` steps, and with a line of text when something is amiss.
        workers: the processes that train together; each one's `loss_at` sees its own share of the batch.
        identity: what else makes this run the one that it is (data, model), JSON-compatible; a checkpoint of another is refused.
        should_stop: asked after every step.
        observe: called after every step with the number of steps taken and the trained weights that a result would have.

    Returns:
        A copy of `model` that holds the exponential moving average of its weights (the last weights with ema_decay None).

    Raises:
        UsageError: the checkpoints in `folder` are of another run.
        OutputError: the disk has no room for a checkpoint; the one before is whole.
        TrainingError: NAN_STEPS steps in a row were not finite; no checkpoint holds such values.
        InterruptedRunError: `should_stop` said so; a checkpoint of this very step is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    described = {**asdict(config), "betas": list(config.betas), "identity": dict(identity or {})}
    average = None if config.ema_decay is None else {name: p.detach().clone() for name, p in parameters.items()}
    first = 0
    found = load_newest(folder, report)
    if found is not None:
        _check_same_run(found, config, described)
        first = found.step
        model.load_state_dict(found.model, strict=False)
        if average is not None:
            average = {name: found.average[name].to(tensor.device) for name, tensor in average.items()}
        _restore_optimizer(optimizer, parameters, found.optimizer)
    log = folder / "losses.jsonl"
    if workers.writes:
        keep_log_until(log, first)
        _wait_for_room(folder, parameters, average, config, report)
    sums: dict[str, list[float]] = defaultdict(list, {} if found is None else found.pending)
    started, bad, saved = time.monotonic(), 0, first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        losses: list[Tensor] = []
        others: list[tuple[str, float]] = []
        for micro in range(config.accumulate):
            scalars = loss_at(step * config.accumulate + micro)
            (scalars["loss"] / config.accumulate).backward()
            losses.append(scalars["loss"].detach())
            others += [(name, value.item()) for name, value in scalars.items() if name != "loss"]
        loss, stopping = workers.average(parameters.values(), torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(float(should_stop()))]))
        norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            optimizer.step()
            bad = 0
            for name, value in (("loss", loss.item()), *others):
                sums[name].append(value)
            if average is not None and config.ema_decay is not None:
                update_average(average, parameters, min(config.ema_decay, (1 + step) / (10 + step)))
        else:
            bad += 1
            report(f"step {step + 1}: the loss ({loss.item():g}) or its gradient is not finite; the step was skipped")
        optimizer.zero_grad(set_to_none=True)
        if bad == NAN_STEPS:
            raise TrainingError(
                f"{NAN_STEPS} steps in a row up to step {step + 1} were not finite; a lower learning rate, float32 or other data is needed; "
                f"the checkpoint of step {saved} is whole."
            )
        if workers.writes and ((step + 1) % config.log_every == 0 or step + 1 == config.steps):
            means = {name: round(sum(values) / len(values), 5) for name, values in sums.items()}
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, **means}) + "\n")
            report(Logged(step + 1, config.steps, means, (time.monotonic() - started) / (1 + step % config.log_every)))
            sums.clear()
            started = time.monotonic()
        last = step + 1 == config.steps or stopping.item() > 0
        if workers.writes and (last or (step + 1) % config.save_every == 0):
            weights = {name: p.detach() for name, p in parameters.items()}
            state = _optimizer_state(optimizer, parameters)
            _save(folder, Checkpoint(step + 1, weights, average or {}, state, described, dict(sums)), config, report)
        saved = step + 1 if last or (step + 1) % config.save_every == 0 else saved
        observe(step + 1, parameters if average is None else average)
        if stopping.item() > 0 and step + 1 < config.steps:
            raise InterruptedRunError(f"stopped after step {step + 1} of {config.steps}")
    return _with_weights(model, average or {})


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


def _check_same_run(found: Checkpoint, config: TrainConfig, described: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run would not have written; a run may be lengthened until its cooldown begins."""
    for field, value in found.config.items():
        if field not in _MAY_CHANGE and field in described and described[field] != value:
            raise UsageError(
                f"the checkpoint of step {found.step} is of a run with {field} = {value!r:.300}, this one has {described[field]!r:.300}; "
                "give it a folder of its own, or run it as before."
            )
    old = (found.config["steps"], found.config["cooldown"])
    if old != (config.steps, config.cooldown) and found.step > min(old[0] - old[1], config.steps - config.cooldown):
        raise UsageError(f"the learning rate has begun to fall in the run of {old[0]} steps, so its length cannot be changed; run it as before.")


def _optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Weights:
    return {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        prefix = f"{name}."
        keys: Iterable[str] = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: state[prefix + key].clone().to(parameter.device) for key in keys if prefix + key in state}


def _save(folder: Path, checkpoint: Checkpoint, config: TrainConfig, report: Callable[[Logged | str], None]) -> None:
    while True:
        try:
            save(folder, checkpoint)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"the checkpoint of step {checkpoint.step} could not be written ({error.strerror}); the one before is whole."
                ) from error
            if config.when_full == "stop":
                raise OutputError(f"the disk is full at step {checkpoint.step}; make room and run again: the checkpoint before is whole.") from error
            report(f"step {checkpoint.step}: the disk is full; waiting for room")
            time.sleep(_POLL_SECONDS)
        else:
            return


def _wait_for_room(
    folder: Path, parameters: Mapping[str, nn.Parameter], average: Weights | None, config: TrainConfig, report: Callable[[Logged | str], None]
) -> None:
    """Check before the first step that two checkpoints fit: the newest is whole before the one before it is deleted."""
    one = sum(p.numel() * p.element_size() for p in parameters.values()) * 3 + sum(t.numel() * t.element_size() for t in (average or {}).values())
    while shutil.disk_usage(folder).free < 2 * one:
        free = shutil.disk_usage(folder).free
        if config.when_full == "stop":
            raise OutputError(f"the disk has {free / 2**20:.0f} MiB free, two checkpoints of this run need {2 * one / 2**20:.0f}; make room first.")
        report(f"the disk has {free / 2**20:.0f} MiB free, {2 * one / 2**20:.0f} are needed; waiting for room")
        time.sleep(_POLL_SECONDS)


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = deepcopy(model)
    other.load_state_dict(weights, strict=False)
    return other.eval().requires_grad_(False)
