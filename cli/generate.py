"""`tu-diffuse generate`: prompts to picture files."""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..pipeline.limits import RANGES
from .options import Attention, Debug, Device, DType, Embeddings, Json, Loras, Model, Offload, PredictionType, Quantize, Variant, grouped
from .picture_options import ControlOptions, EditOptions


@grouped
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What the picture should show; several make several pictures; - reads standard input.")
    ],
    *,
    model: Model = None,
    prediction_type: PredictionType = None,
    variant: Variant = None,
    out: Annotated[Path | None, typer.Option(help="File (.png, .jpg, .webp) or folder. [default: the current folder]")] = None,
    seed: Annotated[int | None, typer.Option(help="0..4294967295. [default: random, recorded in the picture]")] = None,
    count: Annotated[int, typer.Option(help="Pictures of each prompt, with the seeds SEED, SEED+1, ...")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [default: the model's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale s of uncond + s*(cond - uncond); 1 is none. [default: the model's]")] = None,
    sampler: Annotated[str | None, typer.Option(help="How each step is computed; an unknown name lists them. [default: the model's]")] = None,
    schedule: Annotated[str | None, typer.Option(help="How noise levels are spaced; an unknown name lists them. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    guidance_rescale: Annotated[float, typer.Option(help="0..1: pull the guided prediction back to the spread of the unguided one.")] = 0.0,
    guidance_interval: Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="Guide only between these noise levels (sigma).")] = None,
    sigmas: Annotated[str | None, typer.Option(metavar="S1,S2,...", help="Custom noise levels, falling, in place of --steps and --schedule.")] = None,
    apg: Annotated[bool, typer.Option("--apg", help="Adaptive projected guidance: stronger guidance without burnt colours.")] = False,
    dynamic_threshold: Annotated[float | None, typer.Option(help="0..1: clamp each prediction at this percentile, as Imagen does.")] = None,
    eta: Annotated[float | None, typer.Option(help="0..1, share of fresh noise in a step, for samplers that take it.")] = None,
    edit: EditOptions,
    syntax: Annotated[str, typer.Option(help="plain, or weighted: (word:1.3), [word], BREAK and {a|b} have their customary meaning.")] = "plain",
    long_prompts: Annotated[str, typer.Option(help="chunk: CLIP reads past its 77 tokens in chunks; truncate: it does not.")] = "chunk",
    no_t5: Annotated[bool, typer.Option("--no-t5", help="Do not load T5, for models with CLIP and T5.")] = False,
    clip_weight: Annotated[float, typer.Option(help="0..10: how much CLIP's tokens count beside T5's.")] = 1.0,
    t5_weight: Annotated[float, typer.Option(help="0..10: how much T5's tokens count beside CLIP's; 0 is --no-t5.")] = 1.0,
    steered: ControlOptions,
    format: Annotated[str | None, typer.Option(help="png, jpeg or webp. [default: from --out, else png]")] = None,
    name: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="File names in a folder. [default: {prompt}-{seed}]")] = None,
    steps_strip: Annotated[bool, typer.Option("--steps-strip", help="Also save each step's prediction in one strip, with its expert.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="While drawing, keep a preview file beside the output up to date.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a prompt with words beyond the text encoders' limits.")] = False,
    lora: Loras = None,
    embedding: Embeddings = None,
    dtype: DType = "auto",
    device: Device = "auto",
    attention: Attention = "auto",
    quantize: Quantize = "none",
    offload: Offload = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures of prompts.

    The path of each picture is printed; progress goes to standard error. Pictures are never overwritten.

    Examples:

      tu-diffuse generate "a red apple to the left of a blue star"

      tu-diffuse generate "a yellow star" --seed 7 --count 4 --out stars/

      tu-diffuse generate "a castle" --model my-sd15 --lora style.safetensors:0.8 --lora light.safetensors

      tu-diffuse generate "a lighthouse" --model sd21-768.safetensors --prediction-type v

      echo "a green heart" | tu-diffuse generate - --out heart.webp

      tu-diffuse generate "a green star" --init-image photo.jpg --mask hole.png

      tu-diffuse generate "a blue circle" --upscale 2 --tile xy

      tu-diffuse generate "a {red|blue} star, (night:1.3)" --syntax weighted --count 8

      tu-diffuse generate "a castle" --model my-sd15 --control canny --control-image house.jpg --control-model control-canny

    With --json each picture is one line: path, steps_strip, prompt, seed, seconds, truncated (words that did not fit),
    fallbacks, settings (all that was applied).
    """
    del debug  # read in main.py
    texts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
    if prompts.count("-") > 1:
        raise UsageError("- is given more than once but standard input can be read only once; give it once.")
    fewest, most = RANGES["count"]
    if not fewest <= count <= most:
        raise UsageError(f"--count {count} is out of range; give a number from {fewest} to {most}.")

    from ..pipeline.adapters.adapters import Shelf
    from ..pipeline.metadata import encode_picture
    from ..pipeline.model.folder import open_folder
    from ..pipeline.model.loading import adapted_to, load_model, texts_of
    from ..pipeline.output import plan_target, publish
    from ..pipeline.previews import LivePreview, StepsStrip, to_image
    from ..pipeline.request import batches, steps_of
    from ..pipeline.resolve import resolve_all
    from ..pipeline.seeds import random_seed
    from ..pipeline.text_to_image import Progress, text_to_image
    from .progress import Reporter

    folder = open_folder(model, prediction_type, variant)
    shelf = Shelf(folder)
    loras, embeddings = [shelf.lora(text) for text in lora or []], [shelf.embedding(text) for text in embedding or []]
    requests = [
        request
        for text, first in ((text, random_seed(count) if seed is None else seed) for text in texts)
        for request in resolve_all(
            folder,
            text,
            range(first, first + count),
            negative=negative,
            width=width,
            height=height,
            steps=steps,
            sampler=sampler,
            schedule=schedule,
            sigmas=None if sigmas is None else _numbers("sigmas", sigmas),
            eta=eta,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            guidance_interval=None if guidance_interval is None else _pair("guidance-interval", guidance_interval),
            apg=apg,
            dynamic_threshold=dynamic_threshold,
            strict=strict,
            loras=loras,
            embeddings=embeddings,
            **vars(edit),
            syntax=syntax,
            long_prompts=long_prompts,
            no_t5=no_t5,
            clip_weight=clip_weight,
            t5_weight=t5_weight,
            **vars(steered),
        )
    ]
    for unused in (one for one in embeddings if not one.named_in(*texts, negative)):
        raise UsageError(f"the word {unused.token!r} of --embedding {unused.name} stands in no prompt; write it where it belongs, or leave it out.")
    target = plan_target(out, name, format, pictures=len(texts) * count)
    loaded = load_model(folder, dtype=dtype, device=device, attention=attention, quantize=quantize, offload=offload, texts=texts_of(shelf, requests))
    gc.freeze()
    gc.enable()

    number = 0
    work = [batch for request in requests for batch in batches(request)]
    with Reporter(total=sum(steps_of(batch) for batch in work)) as reporter:
        for said in shelf.partial:
            reporter.say(said)
        if any(request.seems_weighted for request in requests):
            reporter.say("(word:1.3) is taken as it stands; --syntax weighted reads it as a weight")
        for batch in work:
            started = time.perf_counter()
            names = [target.name(batch.words, s, number + i + 1) for i, s in enumerate(batch.seeds)]
            number += len(names)
            live = LivePreview(loaded.codec, target.folder, names[0], reporter.say) if preview else None
            strip = StepsStrip() if steps_strip else None
            try:
                loaded = adapted_to(loaded, shelf, batch)
                for event in text_to_image(loaded, batch):
                    if isinstance(event, Progress):
                        reporter.step(event)
                        for watcher in (live, strip):
                            if watcher is not None:
                                watcher.add(event)
                        continue
                    path = publish(encode_picture(to_image(event.pixels), event.settings, target.picture_format), target.folder, names[event.index])
                    saved = None if strip is None else publish(strip.render(loaded.codec, event.index), target.folder, f"{path.stem}-steps.png")
                    for encoder, words in event.settings["truncated"].items():
                        reporter.say(f"not seen by the text encoder {encoder}: {words}")
                    if seed is None:
                        reporter.say(f"seed {event.seed}")
                    line = {
                        "path": str(path),
                        "steps_strip": None if saved is None else str(saved),
                        "prompt": batch.prompt,
                        "seed": event.seed,
                        "seconds": round(time.perf_counter() - started, 3),
                        "truncated": event.settings["truncated"],
                        "fallbacks": event.settings["fallbacks"],
                        "settings": event.settings,
                    }
                    print(json.dumps(line) if as_json else "\n".join(str(p) for p in (path, saved) if p is not None), flush=True)
            finally:
                if live is not None:
                    live.remove()


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{option} {text!r} is not a list of numbers; write for example 14.6,3.2,0.5.") from None


def _pair(option: str, text: str) -> tuple[float, float]:
    numbers = _numbers(option, text)
    if len(numbers) != 2:
        raise UsageError(f"--{option} {text!r} is not two numbers; write for example 0.28,5.42.")
    return numbers[0], numbers[1]
