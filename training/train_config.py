"""How to optimise: the settings of a run, its learning rate at every step, and which of them a resumed run may change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError
from .checkpoints import Checkpoint

Fall = Literal["cosine", "linear", "sqrt"]
OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy"]
_MAY_CHANGE = ("steps", "cooldown", "save_every", "log_every", "when_full")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to optimise.

    The learning rate warms up over `warmup` steps, stays at `lr`, and falls to zero over the last `cooldown` steps; a run may be lengthened as
    long as its cooldown has not begun.

    Attributes:
        fall: how the rate falls, with x from 0 to 1: half a "cosine", "linear", or "sqrt", 1 − √x (Hägele et al. 2024, arXiv 2405.18392).
        optimizer: see `optimizers.make_optimizer`.
        betas: of AdamW; the other optimizers have their own.
        accumulate: micro-steps whose gradients are averaged into one step.
        loss_scaling: scale the loss so that float16 gradients neither vanish nor overflow (Micikevicius et al. 2018, arXiv 1710.03740).
        ema_decay: of the averaged weights; None keeps no average, the result is then the last weights.
        snapshot_every: steps between snapshots of the averages of `posthoc`; None keeps neither.
        when_full: what to do when the disk has no room for a checkpoint: "stop", or "wait" until there is.
    """

    steps: int
    lr: float
    warmup: int = 200
    cooldown: int = 0
    fall: Fall = "cosine"
    optimizer: OptimizerName = "adamw"
    accumulate: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss_scaling: bool = False
    ema_decay: float | None = 0.999
    snapshot_every: int | None = None
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    when_full: Literal["stop", "wait"] = "stop"

    def learning_rate(self, step: int) -> float:
        """The rate of 0-based `step`."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        match self.fall:
            case "cosine":
                falling = 0.5 - 0.5 * math.cos(math.pi * left)
            case "linear":
                falling = left
            case "sqrt":
                falling = 1 - math.sqrt(1 - left)
        return self.lr * rising * falling

    def snapshot_due(self, step: int) -> bool:
        """Whether a snapshot is written after 1-based `step`: every `snapshot_every` steps, and at the end."""
        return self.snapshot_every is not None and (step % self.snapshot_every == 0 or step == self.steps)


def check_same_run(found: Checkpoint, config: TrainConfig, described: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run would not have written; a run may be lengthened until its cooldown begins.

    Args:
        found: the checkpoint.
        config: of this run.
        described: `config` and what else makes the run, as its checkpoints describe it.

    Raises:
        UsageError: it is of another run.
    """
    for field, value in found.config.items():
        if field not in _MAY_CHANGE and field in described and described[field] != value:
            raise UsageError(
                f"the checkpoint of step {found.step} is of a run with {field} = {value!r:.300}, this one has {described[field]!r:.300}; "
                "give it a folder of its own, or run it as before."
            )
    old = (found.config["steps"], found.config["cooldown"])
    if old != (config.steps, config.cooldown) and found.step > min(old[0] - old[1], config.steps - config.cooldown):
        raise UsageError(f"the learning rate has begun to fall in the run of {old[0]} steps, so its length cannot be changed; run it as before.")
