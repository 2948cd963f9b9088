"""What a fine-tuning run is told: one frozen record of every option, read from flags and a TOML file alike, and checked before anything is loaded."""

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError
from ..shards.filters import Filters, aspect_range, make_filters
from .train_config import Fall, OptimizerName


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Every option of `tu-diffuse finetune`; the names are those of the flags and of the keys in a TOML file.

    Attributes:
        shards: patterns of LAION-style shards.
        steps: optimizer steps in all.
        batch_size: samples a step and accumulation, of all processes together.
        lr: the highest learning rate; 1 by default for prodigy, which multiplies the rate that it finds by it.
        warmup: steps over which the learning rate rises.
        lr_schedule: "constant" after the warmup, or how it falls to zero (`train_config.Fall`); None is "cosine" with a cooldown, else "constant".
        cooldown: last steps over which it falls; None is all after the warmup when `lr_schedule` says how, else 0.
        accumulate: batches whose gradients make one step.
        save_every: steps between checkpoints.
        seed: of everything random.
        expert: train this expert only, on its own noise levels and a margin; None trains all.
        train: what is trained: "unet", "text-encoders" (all of the model's) and "conditioner" (the join of CLIP and T5), separated by commas.
        lora: rank of the adapters; None trains all weights.
        lora_alpha: scale of the adapters times their rank; None is the rank.
        format: layout of the LoRA file.
        resolution: side in pixels; None is the model's.
        buckets: sort pictures by aspect ratio instead of cutting squares.
        min_snr: γ of the Min-SNR weights.
        noise_offset: see `objective.Objective`.
        zero_terminal_snr: train on the schedule of `terminal_snr.with_zero_terminal_snr`, which the result records.
        caption_dropout: chance that a sample loses all text.
        clip_dropout: chance that it loses CLIP's.
        t5_dropout: chance that it loses T5's.
        ema: decay of the averaged weights; None saves the last ones.
        ema_posthoc: steps between snapshots of two averages, of which `averaging.average_run` makes others; None keeps none.
        optimizer: see `optimizers.make_optimizer`.
        weight_decay: of the optimizer.
        max_grad_norm: longer gradients are scaled down to it.
        precision: of the U-Net's arithmetic; weights stay float32, and with float16 the loss is scaled.
        gradient_checkpointing: compute the U-Net's activations again on the way back instead of keeping them.
        sharded: share the networks that are trained among the processes, see `sharding.shard`; else each has them whole.
        workers: threads that read and decode.
        skip_damaged: leave damaged samples out (up to 1%).
        filter: preset of `filters.PRESETS`; the nine options after it are the attributes of `filters.Filters`, `aspect` as "low,high".
        when_full: "stop" or "wait" when the disk is full.
        validate_every: steps between validations; None validates at the end only.
        validation_share: share of the samples that is held out for the validation loss.
        prompts: drawn with the whole ensemble at each validation.
        track: accelerate's trackers that are told of progress.
        resume: refuse to begin a run that has no checkpoint.
        threads: of PyTorch; None leaves its choice.
    """

    shards: tuple[str, ...]
    steps: int
    batch_size: int = 4
    lr: float = 1e-4
    warmup: int = 0
    lr_schedule: Literal["constant", "cosine", "linear", "sqrt"] | None = None
    cooldown: int | None = None
    accumulate: int = 1
    save_every: int = 500
    seed: int = 0
    expert: str | None = None
    train: str = "unet"
    lora: int | None = None
    lora_alpha: float | None = None
    format: Literal["diffusers", "kohya"] = "diffusers"
    resolution: int | None = None
    buckets: bool = False
    min_snr: float | None = None
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    caption_dropout: float = 0.1
    clip_dropout: float = 0.0
    t5_dropout: float = 0.0
    ema: float | None = None
    ema_posthoc: int | None = None
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    sharded: bool = False
    workers: int = 2
    skip_damaged: bool = False
    filter: str | None = None
    language: str | None = None
    max_unsafe: float | None = None
    min_aesthetic: float | None = None
    aesthetic_version: Literal["v1", "v2"] | None = None
    max_watermark: float | None = None
    min_similarity: float | None = None
    min_size: int | None = None
    aspect: str | None = None
    missing: Literal["keep", "drop"] | None = None
    when_full: Literal["stop", "wait"] = "stop"
    validate_every: int | None = None
    validation_share: float = 0.0
    prompts: tuple[str, ...] = ()
    track: tuple[str, ...] = ()
    resume: bool = False
    threads: int | None = None

    @property
    def falling(self) -> tuple[int, Fall]:
        """Over how many last steps the learning rate falls, and how."""
        if self.lr_schedule is None or self.lr_schedule == "constant":
            return self.cooldown or 0, "cosine"
        return self.steps - self.warmup if self.cooldown is None else self.cooldown, self.lr_schedule


PARTS = ("unet", "text-encoders", "conditioner")
"""What can be trained."""
_AT_LEAST: dict[str, float] = {
    "steps": 1,
    "batch_size": 1,
    "warmup": 0,
    "cooldown": 0,
    "accumulate": 1,
    "save_every": 1,
    "seed": 0,
    "lora": 1,
    "resolution": 1,
    "noise_offset": 0,
    "weight_decay": 0,
    "workers": 0,
    "validate_every": 1,
    "ema_posthoc": 1,
    "threads": 1,
}
_ABOVE_ZERO = ("lr", "lora_alpha", "min_snr", "max_grad_norm")
_SHARES = ("caption_dropout", "clip_dropout", "t5_dropout", "ema", "validation_share")


def read_toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file, names with dashes or underscores.

    Raises:
        UsageError: it is not there or not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"the config file {path.name!r} cannot be read ({error}); give a TOML file with the names of the flags as keys.") from error
    return {name.replace("-", "_"): value for name, value in content.items()}


def make_config(values: Mapping[str, Any]) -> FinetuneConfig:
    """Check options and fill in defaults; a value of None counts as not given.

    Raises:
        UsageError: an unknown name, a wrong type, a value out of range, or values that contradict each other.
    """
    given = {name: value for name, value in values.items() if value is not None}
    hints = get_type_hints(FinetuneConfig)
    for name in given:
        if name not in hints:
            raise UsageError(f"the option {name!r} is not known; known are {', '.join(sorted(hints))}.")
    for name in ("shards", "steps"):
        if name not in given:
            raise UsageError(f"--{name} is missing; give it as a flag or in the config file.")
    if given.get("optimizer") == "prodigy":
        given.setdefault("lr", 1.0)
    config = FinetuneConfig(**{name: _typed(name, value, hints[name]) for name, value in given.items()})
    _check(config)
    return config


def _typed(name: str, value: Any, hint: Any) -> Any:
    wanted = next(kind for kind in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)) if kind is not type(None))
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise UsageError(f"--{_flag(name)} {value!r} is not known; use one of {', '.join(get_args(wanted))}.")
        return value
    if get_origin(wanted) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise UsageError(f"--{_flag(name)} is {value!r:.200}; text or a list of texts was wanted.")
        return tuple(items)
    fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UsageError(f"--{_flag(name)} is {value!r:.200}; {wanted.__name__} was wanted.")
    return wanted(value)


def _check(config: FinetuneConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{_flag(field.name)} {value:g} is not a finite number; give one.")
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UsageError(f"--{_flag(name)} {value:g} is out of range; {least:g} or more was wanted.")
    for name in _ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{_flag(name)} {value:g} is out of range; more than 0 was wanted.")
    for name in _SHARES:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{_flag(name)} {value:g} is out of range; 0 up to 1 (exclusive) was wanted.")
    if config.lr_schedule == "constant" and config.cooldown:
        raise UsageError("--lr-schedule constant never falls, so --cooldown has no meaning; leave one of them out.")
    if config.warmup + config.falling[0] > config.steps:
        raise UsageError(f"--warmup {config.warmup} and --cooldown {config.cooldown or 0} are longer than the {config.steps} steps; shorten them.")
    if config.zero_terminal_snr and config.min_snr is not None:
        raise UsageError("--min-snr gives the timestep without signal no weight, so --zero-terminal-snr would not be learned; leave one of them out.")
    if config.optimizer == "prodigy" and config.lr < 0.1:
        raise UsageError(f"--lr {config.lr:g} multiplies the rate that prodigy finds by itself; give 1, or leave it out.")
    parts = config.train.split(",")
    if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        raise UsageError(f"--train {config.train!r} is not known; give one or more of {', '.join(PARTS)}, separated by commas, each once.")
    if "conditioner" in parts and config.format == "kohya":
        raise UsageError("--format kohya has no names for the conditioner; leave it out of --train, or use --format diffusers.")
    if config.lora is None and config.lora_alpha is not None:
        raise UsageError("--lora-alpha has no meaning without --lora; give a rank with --lora, or leave it out.")
    if config.lora is None and config.format != "diffusers":
        raise UsageError(f"--format {config.format} is the layout of a LoRA file; give a rank with --lora, or leave it out.")
    if config.sharded and config.optimizer != "adamw":
        raise UsageError(
            f"--sharded works with adamw, not with --optimizer {config.optimizer}, whose steps need whole weights; leave one of them out."
        )
    if config.validate_every is not None and not config.prompts and config.validation_share == 0:
        raise UsageError("--validate-every has nothing to do; give --prompts to draw or a --validation-share of the samples.")


def filters_of(config: FinetuneConfig) -> Filters:
    """The filters that the options ask for.

    Raises:
        UsageError: limits that `Filters` refuses.
    """
    return make_filters(
        config.filter,
        language=config.language,
        max_unsafe=config.max_unsafe,
        min_aesthetic=config.min_aesthetic,
        aesthetic_version=config.aesthetic_version,
        max_watermark=config.max_watermark,
        min_similarity=config.min_similarity,
        min_size=config.min_size,
        aspect=aspect_range(config.aspect),
        missing=config.missing,
    )


def _flag(name: str) -> str:
    return name.replace("_", "-")
