"""`tu-diffuse finetune`: LAION-style shards to a model."""

import dataclasses
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .opening import open_unpacked
from .options import Debug, Device, Json, Model, PredictionType, grouped
from .shard_options import FilterOptions

if TYPE_CHECKING:
    from ..training.finetune import Plan
    from ..training.tracking import Event
    from ..training.workers import Workers

_NOT_OPTIONS = ("out", "config", "model", "prediction_type", "dry_run", "device", "filters", "as_json", "debug")


@grouped
def finetune(
    *,
    shards: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Shards: a file, 'laion/{00000..00099}.tar', 'laion/*.tar' or a URL; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command again goes on where it stopped.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file whose keys are the names of these flags; a flag wins over it.")] = None,
    model: Model = None,
    prediction_type: PredictionType = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step, of all processes together. [default: 4]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. [default: 1e-4; 1 with prodigy]")] = None,
    warmup: Annotated[int | None, typer.Option(help="First steps, over which the learning rate rises. [default: 0]")] = None,
    lr_schedule: Annotated[
        str | None, typer.Option(help="constant, or how it falls: cosine, linear, sqrt. [default: cosine with --cooldown, else constant]")
    ] = None,
    cooldown: Annotated[
        int | None, typer.Option(help="Last steps, over which it falls to zero. [default: all after the warmup with --lr-schedule, else 0]")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches that make one step. [default: 1]")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [default: 500]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: 0]")] = None,
    expert: Annotated[str | None, typer.Option(help="Train this expert only, on its own noise levels. [default: all]")] = None,
    train: Annotated[str | None, typer.Option(metavar="PARTS", help="unet, text-encoders, conditioner, separated by commas. [default: unet]")] = None,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train low-rank adapters of the attention. [default: all weights]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapters times their rank. [default: the rank]")] = None,
    format: Annotated[str | None, typer.Option(help="Layout of the LoRA file: diffusers or kohya. [default: diffusers]")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side in pixels. [default: the model's]")] = None,
    buckets: Annotated[bool | None, typer.Option("--buckets", help="Keep aspect ratios: batches of equal shape instead of square cuts.")] = None,
    min_snr: Annotated[float | None, typer.Option(help="Gamma of the Min-SNR weights, usually 5. [default: none]")] = None,
    noise_offset: Annotated[float | None, typer.Option(help="Noise shared by a whole channel. [default: 0]")] = None,
    zero_terminal_snr: Annotated[
        bool | None, typer.Option("--zero-terminal-snr", help="End the noise schedule in pure noise; the result records it. Not for epsilon models.")
    ] = None,
    caption_dropout: Annotated[float | None, typer.Option(help="Chance that a sample loses its caption. [default: 0.1]")] = None,
    clip_dropout: Annotated[float | None, typer.Option(help="Chance that it loses CLIP's text only. [default: 0]")] = None,
    t5_dropout: Annotated[float | None, typer.Option(help="Chance that it loses T5's text only. [default: 0]")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of averaged weights, such as 0.999. [default: none kept]")] = None,
    ema_posthoc: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Steps between snapshots for tu-diffuse average, which makes models of other averages afterwards; about a 32nd of --steps. "
            "A snapshot takes 4 bytes a trained weight on disk, a checkpoint 8 more, training 12 more of memory. [default: none kept]",
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adamw8bit, adafactor, lion or prodigy. [default: adamw]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimizer. [default: 0.01]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Longer gradients are scaled down to it. [default: 1]")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 arithmetic; weights stay float32. [default: float32]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory: the U-Net's activations are computed again on the way back.")
    ] = None,
    sharded: Annotated[
        bool | None,
        typer.Option("--sharded", help="Share weights, gradients, optimizer and averages among the processes (FSDP) instead of a copy in each."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that read and decode; no effect on the result. [default: 2]")] = None,
    skip_damaged: Annotated[bool | None, typer.Option("--skip-damaged", help="Leave damaged samples out, up to 1%.")] = None,
    filters: FilterOptions,
    when_full: Annotated[str | None, typer.Option(help="stop or wait when the disk is full. [default: stop]")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. [default: at the end only]")] = None,
    validation_share: Annotated[float | None, typer.Option(help="Share of the samples held out for the validation loss. [default: 0]")] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Drawn at each validation with the whole model; may be repeated.")] = None,
    track: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Tell tensorboard (OUT/tensorboard), wandb, ... of progress; may be repeated.")
    ] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Refuse to begin: go on from a checkpoint that is there.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch. [default: its own choice]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with time and memory from a few steps, and stop.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on LAION-style shards, as img2dataset writes them, or as tu-diffuse shards encode does.

    Run the same command again to go on after an interruption: the result is the same, bit for bit (float32, CPU). The result is OUT/model, an
    ordinary model folder, and with --lora also OUT/pytorch_lora_weights.safetensors.

    Examples:

      tu-diffuse finetune --shards 'laion/{00000..00009}.tar' --out tuned --steps 2000 --lora 16

      tu-diffuse finetune --model my-sd15 --shards cats.tar --out tuned --steps 800 --lora 8 --train unet,text-encoders --format kohya

      tu-diffuse finetune --config run.toml --out tuned --dry-run

      accelerate launch --num-processes 2 -m tu_diffuse finetune --config run.toml --out tuned

      torchrun --nproc-per-node 2 -m tu_diffuse finetune --config run.toml --out tuned --sharded

    With --json each line has an event: plan (model, samples, held_out, encoding, steps, skipped, filtered, options), step (step, steps, scalars,
    images_per_second, seconds_left), validation (step, losses, pictures by prompt), note (text), done (model). The scalars are those of
    OUT/checkpoints/losses.jsonl: loss, loss/t0-99 and so on (plain squared error by noise level), loss/expert/NAME and grad_norm, means since the
    last line, and lr.
    """
    del debug  # read in main.py
    given = {name: value for name, value in locals().items() if name not in _NOT_OPTIONS} | vars(filters)
    given["filter"] = given.pop("preset")
    if out is None:
        raise UsageError("--out is missing; name the folder of the run.")

    import torch

    from ..pipeline.model.place import choose_device
    from ..shards.filters import check_filters, drop_reason
    from ..shards.index import index_shards
    from ..shards.specs import expand
    from ..training.config import filters_of, make_config, read_toml
    from ..training.finetune import finetune as run
    from ..training.finetune import make_plan
    from ..training.loop import InterruptedRunError
    from ..training.optimizers import check_optimizer
    from ..training.sharding import asked_by_launcher
    from ..training.tracking import check_trackers
    from ..training.workers import joined_workers

    values = {**({} if config is None else read_toml(config)), **{name: value for name, value in given.items() if value is not None}}
    options = make_config(values | ({"sharded": True} if asked_by_launcher(values.get("precision", "float32")) else {}))
    check_optimizer(options.optimizer)
    check_trackers(options.track)
    folder, place = open_unpacked(model, prediction_type), choose_device(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    index = index_shards(expand(list(options.shards)), skip_damaged=options.skip_damaged)
    asked = filters_of(options)
    check_filters(asked, [sample.columns for sample in index.samples])
    reasons = [drop_reason(asked, sample.columns) for sample in index.samples]
    plan = make_plan(options, folder, index, [i for i, reason in enumerate(reasons) if reason is None])
    with joined_workers(place) as processes:
        reporter = _Reporter(as_json, options.batch_size * options.accumulate, processes.writes)
        reporter.plan(plan, Counter(reason for reason in reasons if reason is not None))
        if dry_run:
            reporter.say(_measured(plan, processes, place))
            return
        stopped_by: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stopper(stopped_by))
        try:
            result = run(
                plan,
                out,
                reporter,
                workers=processes,
                should_stop=lambda: bool(stopped_by),
                draw_prompts=_drawer(plan, out, place),
                device=place,
            )
        except InterruptedRunError as error:
            reporter.say(f"{error}; run the same command again to go on")
            raise typer.Exit(128 + stopped_by[0] if stopped_by else 1) from None
        reporter.done(result)


class _Reporter:
    """Tells of progress: JSON lines on standard output, or text on standard error and the result's path on standard output."""

    def __init__(self, as_json: bool, images_a_step: int, speaks: bool) -> None:
        self._json, self._images, self._speaks = as_json, images_a_step, speaks

    def __call__(self, event: "Event") -> None:
        from ..training.tracking import Validated

        if isinstance(event, str):
            self.say(event)
            return
        if isinstance(event, Validated):
            pictures = {prompt: str(path) for prompt, path in event.pictures.items()}
            told = {"event": "validation", "step": event.step, "losses": event.losses, "pictures": pictures}
            self._print(told) if self._json else self.say(str(event))
            return
        speed, left = self._images / event.seconds_a_step, (event.steps - event.step) * event.seconds_a_step
        if self._json:
            self._print(
                {
                    "event": "step",
                    "step": event.step,
                    "steps": event.steps,
                    "scalars": event.scalars,
                    "images_per_second": round(speed, 2),
                    "seconds_left": round(left, 1),
                }
            )
        else:
            experts = {name: value for name, value in event.scalars.items() if name.startswith("loss/expert/")}
            split = ", ".join(f"{name.removeprefix('loss/expert/')} {value:.4f}" for name, value in experts.items()) if len(experts) > 1 else ""
            losses = f"loss {event.scalars.get('loss', math.nan):.4f}" + (f" ({split})" if split else "")
            rest = f"lr {event.scalars['lr']:.2g}, {speed:.1f} images/s, {time.strftime('%H:%M:%S', time.gmtime(left))} left"
            self.say(f"step {event.step}/{event.steps} {losses}, {rest}")

    def plan(self, plan: "Plan", filtered: Mapping[str, int]) -> None:
        """Say what will be done; `filtered` are the samples that each filter dropped."""
        if self._json:
            options = dataclasses.asdict(plan.config)
            encoding = None if plan.stored is None else plan.stored.encoding.key
            facts = {"model": plan.folder.name, "samples": len(plan.trained), "held_out": len(plan.held_out), "encoding": encoding}
            left_out = {"skipped": dict(plan.index.skipped), "filtered": dict(filtered)}
            self._print({"event": "plan", **facts, "steps": plan.config.steps, **left_out, "options": options})
            return
        epochs = plan.config.steps * plan.config.batch_size * plan.config.accumulate / len(plan.trained)
        samples = f"{len(plan.trained)} samples ({len(plan.held_out)} held out)"
        self.say(f"{samples}, {plan.config.steps} steps, {epochs:.1f} epochs, model {plan.folder.name}")
        if plan.stored is not None:
            self.say("the shards are encoded: neither the VAE nor a text encoder is loaded")
        for reason, count in filtered.items():
            self.say(f"{count} samples are filtered out by {reason}")
        for note in plan.index.notes:
            self.say(note)

    def say(self, text: str) -> None:
        """Say one line."""
        if self._json:
            self._print({"event": "note", "text": text})
        elif self._speaks:
            print(text, file=sys.stderr, flush=True)

    def done(self, model: Path) -> None:
        """Name the result."""
        if self._json:
            self._print({"event": "done", "model": str(model)})
        elif self._speaks:
            print(model, flush=True)

    def _print(self, line: dict[str, Any]) -> None:
        if self._speaks:
            print(json.dumps(line), flush=True)


def _stopper(stopped_by: list[int]) -> Any:
    """A handler that asks the run to stop; a second signal stops it at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if stopped_by:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stopped_by.append(number)

    return handle


def _drawer(plan: "Plan", out: Path, device: Any) -> Any:
    """Draws the validation prompts, seeds 0, 1, ..., with a model folder; the pictures go to OUT/validation."""
    from ..pipeline.metadata import encode_picture
    from ..pipeline.model.folder import open_folder
    from ..pipeline.model.loading import load_model
    from ..pipeline.previews import to_image
    from ..pipeline.resolve import resolve
    from ..pipeline.text_to_image import Picture, text_to_image
    from ..training.run_report import picture_name

    def draw(folder: Path, step: int) -> None:
        model = load_model(open_folder(folder), device=str(device))
        for number, prompt in enumerate(plan.config.prompts):
            for event in text_to_image(model, resolve(model.folder, prompt, [number])):
                if isinstance(event, Picture):
                    data = encode_picture(to_image(event.pixels), event.settings, "png")
                    (out / "validation" / picture_name(step, number)).write_bytes(data)

    return draw


def _measured(plan: "Plan", processes: "Workers", device: Any) -> str:
    """Time and memory that the run will take, from real steps in a temporary folder, at least two; memory of this process alone."""
    import resource
    import tempfile

    from ..training.finetune import finetune as run
    from ..training.loop import Logged
    from ..training.turns import owned_timesteps, steps_for_all

    steps = max(2, steps_for_all(owned_timesteps(plan.folder, plan.config.expert)))  # the optimizer keeps nothing of an expert before its first turn
    idle: dict[str, Any] = {"validation_share": 0.0, "prompts": (), "track": (), "resume": False}
    short = dataclasses.replace(plan.config, steps=steps, warmup=0, cooldown=None, lr_schedule=None, **idle)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run(
            dataclasses.replace(plan, config=short),
            Path(folder) / "run",
            lambda event: seconds.append(event.seconds_a_step) if isinstance(event, Logged) else None,
            workers=processes,
            device=device,
        )
    if not processes.writes:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = time.strftime("%H:%M:%S", time.gmtime(seconds[-1] * plan.config.steps))
    return f"expected: {seconds[-1]:.2f} s a step, {whole} in all, {peak:.0f} MiB of memory; nothing was written"
