"""Fine-tuning, from a model folder and shards to a model folder: index, split, batches, steps, validation, result.

out/checkpoints/    the newest two checkpoints and losses.jsonl
out/validation/     the loss on held-out samples (validation.jsonl) and pictures of the prompts
out/model/          the result, an ordinary model folder
out/pytorch_lora_weights.safetensors    with --lora, one for each expert
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
from torch import Tensor

from ..errors import UsageError
from ..pipeline.folder import ModelFolder
from .batches import ahead, batch_plan, bucket_of, crop_generator, sizes_for
from .config import FinetuneConfig
from .encoded import encoded_bucket, open_source, stored_encoding
from .encoded_members import StoredEncoding
from .expert_files import Draft, Kept, weights_for, write_model
from .loop import Logged, generator_for, train
from .lora import add_adapters, pairs_of, write_diffusers, write_kohya
from .memory import recompute_activations
from .objective import Draw, Objective, denoising_loss, draw
from .shards import ShardIndex
from .sources import Source
from .subject import Subject, load_subject, predictor
from .tallies import noise_bins
from .train_config import TrainConfig
from .workers import ALONE, Workers

LORA_FILE = "pytorch_lora_weights.safetensors"
_NOT_IDENTITY = ("steps", "lr_schedule", "cooldown", "save_every", "workers", "when_full", "validate_every", "prompts", "threads", "shards")
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
    if config.t5_dropout and folder.family != "clip-t5":
        raise UsageError(f"--t5-dropout has no meaning for {folder.name!r}, which has no T5; leave it out.")
    if config.format == "kohya" and folder.family.startswith("sdxl"):
        raise UsageError("--format kohya is not written for SDXL, whose layers kohya's programs call otherwise; use --format diffusers.")
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
    report: Callable[[Logged | str], None],
    *,
    workers: Workers = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    draw_prompts: Callable[[Path, int], None] | None = None,
    device: torch.device | None = None,
) -> Path:
    """Train as planned, or go on from the newest checkpoint in `out`, and write the result.

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
    if (out / "model").exists():
        raise UsageError(f"{out.name!r} holds a finished run; give another --out.")
    subject = load_subject(plan.folder, config.expert, where)
    if config.lora is not None:
        add_adapters(subject.unets, config.lora, _alpha(config), config.seed)
    if config.gradient_checkpointing:
        recompute_activations(subject.unets)
    first, end = subject.span
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
        seed=config.seed,
        save_every=config.save_every,
        log_every=min(20, config.steps),
        when_full=config.when_full,
    )
    source = open_source(plan.folder, plan.index, plan.stored, where)
    loss_at = _losses(plan, subject, source, objective, workers)
    observe = _observer(plan, subject, source, objective, out, report, workers, draw_prompts)
    trained = train(
        subject.unets,
        loss_at,
        training,
        out / "checkpoints",
        report,
        workers,
        identity=plan.identity,
        should_stop=should_stop,
        observe=observe,
    )
    if workers.writes:
        write_result(plan, dict(trained.state_dict()), out, out / "model")
    return out / "model"


def _alpha(config: FinetuneConfig) -> float:
    return float(config.lora or 0) if config.lora_alpha is None else config.lora_alpha


def _losses(plan: Plan, subject: Subject, source: Source, objective: Objective, workers: Workers) -> Callable[[int], Mapping[str, Tensor]]:
    """The loss of a micro-step; its batches are read ahead, and taken up at the step that is asked for first."""
    config, precision = plan.config, getattr(torch, plan.config.precision)
    batches: Iterator[list[tuple[int, Any]]] = iter(())
    following = -1

    def read(sample: int) -> tuple[int, Any]:
        number = plan.trained[sample]
        return number, source.read(number, plan.sizes[plan.bucket_of[number]], crop_generator(config.seed, number))

    def loss_at(step: int) -> Mapping[str, Tensor]:
        nonlocal batches, following
        if step != following:
            planned = batch_plan([plan.bucket_of[number] for number in plan.trained], config.batch_size, config.seed)
            batches = ahead(read, (batch[workers.rows] for batch in islice(planned, step, None)), config.workers)
        following = step + 1
        samples = next(batches)
        generator = generator_for(config.seed, step)
        posteriors = [generator_for(config.seed, (step + 1) * (1 << 20) + number) for number, _ in samples]
        batch = source.batch([row for _, row in samples], posteriors)
        drawn = draw(objective, (config.batch_size, *batch.latents.shape[1:]), generator).rows(workers.rows)
        said = batch.said(drawn)
        with torch.autocast(subject.device.type, precision, enabled=precision is not torch.float32):
            return denoising_loss(predictor(subject, lambda _: said), objective, batch.latents, _on(drawn, subject.device))

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
                predict = predictor(subject, lambda _, said=said: said)
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
    source: Source,
    objective: Objective,
    out: Path,
    report: Callable[[Logged | str], None],
    workers: Workers,
    draw_prompts: Callable[[Path, int], None] | None,
) -> Callable[[int, Mapping[str, Tensor]], None]:
    """After every `validate_every` steps and at the end: the loss on held-out samples, and the prompts drawn with the weights of that moment."""
    config, folder = plan.config, out / "validation"

    def observe(step: int, weights: Mapping[str, Tensor]) -> None:
        due = step == config.steps or (config.validate_every is not None and step % config.validate_every == 0)
        if not workers.writes or not due:
            return
        if plan.held_out:
            now = {name: tensor.detach().clone() for name, tensor in subject.unets.state_dict().items() if name in weights}
            subject.unets.load_state_dict(dict(weights), strict=False)
            subject.unets.eval()
            losses = validation_loss(plan, subject, source, objective)
            subject.unets.train()
            subject.unets.load_state_dict(now, strict=False)
            folder.mkdir(exist_ok=True)
            path = folder / "validation.jsonl"
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step] if path.exists() else []
            path.write_text("".join(f"{line}\n" for line in [*lines, json.dumps({"step": step, **losses})]))
            report(f"step {step}: validation loss " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if draw_prompts is not None and config.prompts:
            folder.mkdir(exist_ok=True)
            draft = folder / f".model-{os.getpid()}"
            try:
                write_result(plan, {**subject.unets.state_dict(), **weights}, None, draft)
                draw_prompts(draft, step)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    return observe


def write_result(plan: Plan, weights: Mapping[str, Tensor], lora_to: Path | None, target: Path) -> None:
    """Write the model folder `target` with the trained weights; with LoRA they are added to the base's, and the pairs are written to `lora_to`."""
    config, folder = plan.config, plan.folder
    drafts: list[Draft] = []
    for entry in folder.experts:
        if config.expert not in (None, entry.name):
            drafts.append(Draft(entry, Kept(folder.path / entry.subfolder)))
            continue
        prefix = f"{entry.name}."
        state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if config.lora is not None:
            pairs = pairs_of(weights, entry.name)
            if lora_to is not None:
                name = LORA_FILE if len(folder.experts) == 1 else f"{entry.name}-{LORA_FILE}"
                if config.format == "kohya":
                    write_kohya(lora_to / name, pairs, _alpha(config))
                else:
                    write_diffusers(lora_to / name, pairs, config.lora, _alpha(config))
            state = _merged(state, pairs, _alpha(config) / config.lora)
        dtype = _stored_dtype(folder.path / entry.subfolder)
        tensors = {name: tensor.detach().cpu().to(dtype) for name, tensor in state.items()}
        drafts.append(Draft(entry, weights_for(folder.path / entry.subfolder, tensors)))
    write_model(folder, drafts, target)


def _merged(state: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    """The U-Net's own tensors out of those with adapters beside them, each pair added to its weight."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_A." not in name and ".lora_B." not in name}
    for module, (down, up) in pairs.items():
        plain[f"{module}.weight"] = plain[f"{module}.weight"] + scale * (up @ down)
    return plain


def _stored_dtype(folder: Path) -> torch.dtype:
    from ..unet.deltas import read_expert

    return next(stored.tensor.dtype for stored in read_expert(folder).values())
