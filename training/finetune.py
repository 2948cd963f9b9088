"""Fine-tuning, from a model folder and shards to a model folder: index, split, batches, steps, validation, result.

out/checkpoints/    the newest two checkpoints, losses.jsonl, and averages/ for `averaging.py`
out/validation/     the loss on held-out samples (validation.jsonl) and pictures of the prompts
out/report.html     curves and validation pictures, also as report.png; written at each validation
out/model/          the result, an ordinary model folder
out/pytorch_lora_weights.safetensors    with --lora; in an ensemble one for each network
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..pipeline.model.folder import T5_ADDED, ModelFolder
from ..pipeline.staging import remove_staged, write_file
from ..shards.encoded_members import StoredEncoding
from ..shards.index import ShardIndex
from .batches import ahead, batch_plan, bucket_of, crop_generator, sizes_for
from .checkpoints import load_newest
from .config import FinetuneConfig
from .encoded import encoded_bucket, open_source, stored_encoding
from .loop import generator_for, train
from .memory import recompute_activations
from .objective import Draw, Objective, denoising_loss, draw
from .result import lora_files, write_result
from .run_report import picture_name, write_report
from .sharding import shard, whole
from .sources import Source
from .subject import Subject, load_subject, predictor, read_as, trained_networks
from .tallies import noise_bins
from .terminal_snr import with_zero_terminal_snr
from .tracking import Event, Validated, check_trackers, trackers
from .train_config import TrainConfig
from .turns import expert_at, expert_of_step, span
from .workers import ALONE, Workers

_TIMING = ("steps", "lr_schedule", "cooldown", "save_every")  # `train` itself compares these
_NOT_IDENTITY = (*_TIMING, "workers", "when_full", "validate_every", "prompts", "threads", "shards", "track", "resume", "sharded")
VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the trained timesteps, at which the validation loss is measured


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run will do, known before its first step.

    Attributes:
        config: every option.
        folder: the model.
        index: of the shards.
        stored: how encoded shards were made; None for pictures.
        trained: sample numbers trained on.
        held_out: sample numbers of the validation loss.
        sizes: the buckets, (width, height).
        bucket_of: bucket of each sample of either.
    """

    config: FinetuneConfig
    folder: ModelFolder
    index: ShardIndex
    stored: StoredEncoding | None
    trained: tuple[int, ...]
    held_out: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    bucket_of: Mapping[int, int]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a checkpoint one of this run: options that change the weights, the model and the samples."""
        options = {name: value for name, value in asdict(self.config).items() if name not in _NOT_IDENTITY}
        return {"options": options, "model": self.folder.fingerprint, "data": self.index.fingerprint(), "kept": list(self.trained[:64])}


def make_plan(config: FinetuneConfig, folder: ModelFolder, index: ShardIndex, kept: Sequence[int]) -> Plan:
    """Split the kept samples and sort them into buckets.

    Args:
        config: every option.
        folder: the model.
        index: of the shards.
        kept: numbers of the samples that passed the filters.

    Raises:
        UsageError: the options or encoded shards do not fit the model, or too few samples are left.
    """
    reading, text = read_as(folder, config.expert)
    if text is not None and config.train != "unet":
        raise UsageError(f"expert {config.expert!r} reads prompts in its own way; train its text encoders in the folder that it came from.")
    if config.t5_dropout and reading.family not in ("clip-t5", *T5_ADDED.values()):
        raise UsageError(f"--t5-dropout has no meaning for {folder.name!r}, which has no T5; leave it out.")
    if "conditioner" in config.train.split(",") and reading.family not in ("clip-t5", *T5_ADDED.values()):
        raise UsageError(f"--train conditioner has no meaning for {folder.name!r}, which does not join CLIP and T5; leave it out.")
    if config.zero_terminal_snr:
        if config.expert is not None and len(folder.experts) > 1:
            raise UsageError("--zero-terminal-snr changes the noise levels of every expert; leave --expert out.")
        folder = with_zero_terminal_snr(folder)
    sizes = sizes_for(folder, config.resolution, config.buckets)
    stored = stored_encoding(folder, index, sizes[0][0], config.buckets)
    generator = generator_for(config.seed, 1 << 37)
    order = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
    count = round(len(order) * config.validation_share)
    held_out, trained = order[:count], sorted(order[count:])
    if len(trained) < config.batch_size:
        raise UsageError(f"{len(trained)} samples are left to train on, fewer than --batch-size {config.batch_size}; loosen the filters or lower it.")
    buckets = {number: bucket_of(index, number, sizes) if stored is None else encoded_bucket(index, number, sizes, folder.factor) for number in order}
    return Plan(config, folder, index, stored, tuple(trained), tuple(held_out), sizes, buckets)


def finetune(
    plan: Plan,
    out: Path,
    report: Callable[[Event], None],
    *,
    workers: Workers = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    draw_prompts: Callable[[Path, int], None] | None = None,
    device: torch.device | None = None,
) -> Path:
    """Train as planned, or go on from the newest checkpoint in `out`, and write the result; a finished run of this plan is left as it is.

    Args:
        plan: from `make_plan`.
        out: the run's folder, see the module.
        report: told of progress.
        workers: processes that train together.
        should_stop: asked after every step.
        draw_prompts: draws the validation pictures with the model folder and step it is given.
        device: of the networks; the CPU by default.

    Returns:
        The folder of the resulting model.

    Raises:
        UsageError, ModelError, DataError, OutputError, TrainingError, InterruptedRunError: see `loop.train` and `load_subject`.
    """
    config, where = plan.config, torch.device("cpu") if device is None else device
    if config.batch_size % workers.count:
        raise UsageError(f"--batch-size {config.batch_size} cannot be shared equally by {workers.count} processes; take a multiple of that.")
    if config.sharded and workers.count == 1:
        raise UsageError(
            "--sharded shares the model among processes, and this is the only one; start several with accelerate launch, or leave it out."
        )
    if (out / "model").exists():
        if not _is_finished(plan, out):
            raise UsageError(f"{out.name!r} holds a finished run with other options; give another --out.")
        report(f"{out.name!r} is finished")
        return out / "model"
    if workers.writes:
        for folder in (out, out / "validation"):
            remove_staged(folder)
    subject = load_subject(plan.folder, config.expert, where)
    reading, text = read_as(plan.folder, config.expert)
    source = open_source(reading, plan.index, plan.stored, where, text)
    networks = trained_networks(subject, source.networks, config)
    if config.gradient_checkpointing:
        recompute_activations(subject.unets)
    if config.sharded:
        shard(networks, where)
    if config.expert is not None and config.train != "unet" and len(plan.folder.experts) > 1:
        report(f"the text parts that are trained with {config.expert!r} change what all experts of {plan.folder.name!r} read")
    first, end = span(subject.owned)
    objective = Objective(
        sigmas=plan.folder.noise.sigmas,
        t_min=first,
        t_max=end,
        prediction_type=plan.folder.noise.prediction_type,
        drop_all=config.caption_dropout,
        drop_clip=config.clip_dropout,
        drop_t5=config.t5_dropout,
        min_snr=config.min_snr,
        noise_offset=config.noise_offset,
        told_apart=noise_bins(len(plan.folder.noise.sigmas)) | {f"loss/expert/{name}": interval for name, interval in subject.owned.items()},
    )
    cooldown, fall = config.falling
    training = TrainConfig(
        steps=config.steps,
        lr=config.lr,
        warmup=config.warmup,
        cooldown=cooldown,
        fall=fall,
        optimizer=config.optimizer,
        accumulate=config.accumulate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_scaling=config.precision == "float16",
        ema_decay=config.ema,
        snapshot_every=config.ema_posthoc,
        seed=config.seed,
        save_every=config.save_every,
        log_every=min(20, config.steps),
        when_full=config.when_full,
    )
    check_trackers(config.track)
    loss_at = _losses(plan, subject, source, objective, workers)
    with trackers(config.track if workers.writes else (), out, asdict(config)) as track:

        def tell(event: Event) -> None:
            report(event)
            track(event)

        trained = train(
            networks,
            loss_at,
            training,
            out / "checkpoints",
            tell,
            workers,
            identity=plan.identity,
            resume=config.resume,
            should_stop=should_stop,
            observe=_observer(plan, subject, networks, source, objective, out, tell, workers, draw_prompts),
        )
    weights = whole(trained.state_dict(), workers.writes)
    if workers.writes:
        for name, write in lora_files(config, plan.folder, weights).items():  # before the folder, which says that the run is finished
            write_file(out / name, write)
        write_result(config, plan.folder, weights, out / "model")
    return out / "model"


def _is_finished(plan: Plan, out: Path) -> bool:
    found = load_newest(out / "checkpoints")
    return found is not None and found.step == plan.config.steps and found.config["identity"] == plan.identity


def read_batches(plan: Plan, source: Source, first: int, workers: Workers = ALONE) -> Iterator[list[tuple[int, Any]]]:
    """This process's rows of one batch after another from micro-step `first` on, without end: sample numbers and what `source.read` returned.

    Raises:
        DataError: a sample is damaged; raised when its batch is asked for.
    """
    config = plan.config

    def read(sample: int) -> tuple[int, Any]:
        number = plan.trained[sample]
        return number, source.read(number, plan.sizes[plan.bucket_of[number]], crop_generator(config.seed, number))

    planned = batch_plan([plan.bucket_of[number] for number in plan.trained], config.batch_size, config.seed)
    return ahead(read, (batch[workers.rows] for batch in islice(planned, first, None)), config.workers)


def _losses(plan: Plan, subject: Subject, source: Source, objective: Objective, workers: Workers) -> Callable[[int], Mapping[str, Tensor]]:
    """The loss of a micro-step, of the expert whose turn the step is; batches are read ahead, and taken up at the step that is asked for first."""
    config, precision = plan.config, getattr(torch, plan.config.precision)
    batches: Iterator[list[tuple[int, Any]]] = iter(())
    following = -1

    def loss_at(step: int) -> Mapping[str, Tensor]:
        nonlocal batches, following
        if step != following:
            batches = read_batches(plan, source, step, workers)
        following = step + 1
        samples = next(batches)
        expert = expert_of_step(subject.owned, step // config.accumulate)
        first, end = subject.owned[expert]
        own = replace(objective, t_min=first, t_max=end)
        generator = generator_for(config.seed, step)
        posteriors = [generator_for(config.seed, (step + 1) * (1 << 20) + number) for number, _ in samples]
        batch = source.batch([row for _, row in samples], posteriors)
        drawn = draw(own, (config.batch_size, *batch.latents.shape[1:]), generator).rows(workers.rows)
        said = batch.said(drawn)
        predict = predictor(subject, expert, lambda _: said)
        with torch.autocast(subject.device.type, precision, enabled=precision is not torch.float32):
            return denoising_loss(predict, own, batch.latents, _on(drawn, subject.device))

    return loss_at


def _on(drawn: Draw, device: torch.device) -> Draw:
    return Draw(drawn.t.to(device), drawn.noise.to(device), drawn.keep_clip, drawn.keep_t5)


def validation_loss(plan: Plan, subject: Subject, source: Source, objective: Objective) -> dict[str, float]:
    """Mean squared error on the held-out samples at fixed noise levels and with fixed noise, captions kept: "t100" -> loss, and so on.

    Middle cuts, posterior means; the same numbers for the same weights whenever it is called.
    """
    first, end = objective.t_min, objective.t_max
    levels = [first + int(share * (end - first)) for share in VALIDATION_LEVELS]
    sums = dict.fromkeys(levels, 0.0)
    plain = replace(objective, min_snr=None, told_apart={})
    for numbers in _of_one_bucket(plan.held_out, plan):
        size = plan.sizes[plan.bucket_of[numbers[0]]]
        batch = source.batch([source.read(number, size, None) for number in numbers], None)
        shape = batch.latents.shape[1:]
        with torch.no_grad():
            noise = torch.cat([torch.randn((1, *shape), generator=generator_for(plan.config.seed, (1 << 36) + number)) for number in numbers])
            kept = torch.ones(len(numbers), dtype=torch.bool)
            drawn = Draw(torch.full((len(numbers),), first), noise, kept, kept)
            said = batch.said(drawn)
            for level in levels:
                at = _on(replace(drawn, t=torch.full((len(numbers),), level)), subject.device)
                predict = predictor(subject, expert_at(subject.owned, level), lambda _, said=said: said)
                sums[level] += denoising_loss(predict, plain, batch.latents, at)["loss"].item() * len(numbers)
    return {f"t{level}": total / len(plan.held_out) for level, total in sums.items()}


def _of_one_bucket(numbers: Sequence[int], plan: Plan) -> Iterator[list[int]]:
    """Samples in batches, each of one bucket."""
    for bucket in range(len(plan.sizes)):
        inside = [number for number in numbers if plan.bucket_of[number] == bucket]
        for start in range(0, len(inside), plan.config.batch_size):
            yield inside[start : start + plan.config.batch_size]


def _observer(
    plan: Plan,
    subject: Subject,
    networks: nn.Module,
    source: Source,
    objective: Objective,
    out: Path,
    report: Callable[[Event], None],
    workers: Workers,
    draw_prompts: Callable[[Path, int], None] | None,
) -> Callable[[int, Mapping[str, Tensor]], None]:
    """After every `validate_every` steps and at the end: the loss on held-out samples, the prompts drawn with its weights, and a report."""
    config, folder = plan.config, out / "validation"

    def observe(step: int, weights: Mapping[str, Tensor]) -> None:
        due = step == config.steps or (config.validate_every is not None and step % config.validate_every == 0)
        if not due or not (workers.writes or config.sharded):
            return
        losses: dict[str, float] = {}
        pictures: dict[str, Path] = {}
        if plan.held_out:
            now = {name: tensor.detach().clone() for name, tensor in networks.state_dict().items() if name in weights}
            networks.load_state_dict(dict(weights), strict=False)
            networks.eval()
            losses = validation_loss(plan, subject, source, objective)
            networks.train()
            networks.load_state_dict(now, strict=False)
        drawn_with = whole({**networks.state_dict(), **weights}, workers.writes) if config.prompts else {}
        if not workers.writes:
            return
        if losses or config.prompts:
            folder.mkdir(exist_ok=True)
        if losses:
            path = folder / "validation.jsonl"
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step] if path.exists() else []
            text = "".join(f"{line}\n" for line in [*lines, json.dumps({"step": step, **losses})])
            write_file(path, lambda file: file.write_text(text))
        if draw_prompts is not None and config.prompts:
            draft = folder / f".model.{os.getpid()}.staged"
            try:
                write_result(config, plan.folder, drawn_with, draft)
                draw_prompts(draft, step)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            pictures = {prompt: folder / picture_name(step, number) for number, prompt in enumerate(config.prompts)}
        if losses or pictures:
            report(Validated(step, losses, pictures))
        title = f"{plan.folder.name}: {step} of {config.steps} steps, {len(plan.trained)} samples"
        write_report(out, title, asdict(config), config.prompts)

    return observe
