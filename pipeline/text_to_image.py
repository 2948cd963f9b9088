"""From a prompt to pictures. READ THIS FIRST: `text_to_image` is the table of contents of the whole program.

    encode ──> schedule ──> noise ──> denoise ──> decode

Each of them leads to one folder or file: text_encoders/, schedulers/, seeds.py and editing/rounds.py, unet/, vae/. A picture that is enlarged while
it is drawn goes through the first four twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditioning
from ..errors import RenderError, UsageError
from ..schedulers.guidance import Apg, Guidance, GuidedDenoiser, expert_scale, repeated
from ..schedulers.registry import sampler_info
from ..schedulers.schedules import SigmaSchedule
from ..schedulers.step import Step, stages
from ..vae.codec import to_uint8
from .editing.rounds import Start, begin, composited, keeping, round_schedule, round_shape, showing
from .model.folder import ModelFolder
from .model.loading import Model
from .model.readers import Encode
from .request import Request, Round, rounds, steps_of
from .seeds import noise_source, streams
from .settings import applied_settings


@dataclass(frozen=True, eq=False)
class Progress:
    """One finished denoising step of a batch.

    Attributes:
        index: 0-based.
        steps: how many there are.
        sigma: noise level the step started from.
        expert: name of the expert that took it.
        x0: (pictures, channels, h, w) float32; the clean latents as predicted in this step.
    """

    index: int
    steps: int
    sigma: float
    expert: str
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """One finished picture.

    Attributes:
        index: its place in the batch.
        seed: its seed.
        pixels: (height, width, 3) uint8 on the CPU.
        settings: all that was applied, JSON-compatible; what the picture file carries (see `applied_settings`).
    """

    index: int
    seed: int
    pixels: Tensor
    settings: dict[str, Any]


@torch.no_grad()
def text_to_image(model: Model, request: Request) -> Iterator[Progress | Picture]:
    """Draw one batch of pictures, one for each seed of the request.

    Args:
        model: from `loading.load_model`.
        request: from `resolve.resolve`.

    Yields:
        A `Progress` after each step, then a `Picture` for each seed.

    Raises:
        UsageError: words that do not fit the text encoders, in a strict request.
        RenderError: a picture whose values are not finite; raised after the others of the batch were yielded.
    """
    if (request.loras, request.embeddings) != (model.adapters.loras, model.adapters.embeddings):
        raise ValueError("The request names other LoRAs or embeddings than the model was loaded with.")

    folder, codec, device = model.folder, model.codec.tiled(request.tile), model.place.device
    generators, total = streams(request.seeds), steps_of(request)
    latents, truncated = None, dict[str, str]()
    used, fallbacks = list[tuple[str, float, float]](), [*model.fallbacks]
    for part in rounds(request):
        # Encode: the prompt becomes tokens and a pooled vector; experts of different makes, as SDXL's base and refiner, read it in their own ways.
        told = _encode(model, request, part)
        truncated = words_lost({name: words for one in told.values() for name, words in one.overflow.items()}, request.strict)

        # Schedule: the noise levels that the sampler visits.
        schedule = round_schedule(folder, request, part)

        # Noise: each picture draws from its own stream; it begins in noise alone, in a picture under noise, or in a smaller drawing of itself.
        start = begin(folder, lambda: codec, device, [request] * len(request.seeds), part, schedule, generators, latents)

        # Denoise: from expert to expert, the sampler asks the one whose noise levels these are, guided by what it is told.
        latents = start.latents
        for expert, step in _denoise(model, request, part, told, schedule, start, generators):
            latents = step.x
            used.append((expert, step.sigma, step.sigma_next))
            yield Progress(len(used) - 1, total, step.sigma, expert, step.x0)
        latents = latents * schedule.final_scale
        fallbacks += start.fallbacks

    # Decode: one picture at a time, so that the memory it takes does not grow with the batch.
    assert latents is not None
    failed: list[RenderError] = []
    for index, seed in enumerate(request.seeds):
        try:
            decoded = codec.decode(latents[index : index + 1])
        except RenderError as error:
            failed.append(error)
            continue
        pixels = composited(to_uint8(decoded.pixels)[0].cpu(), request.edit, rounds(request)[-1])
        settings = applied_settings(folder, model.place, request, seed, used, truncated, [*fallbacks, *decoded.fallbacks[0]])
        yield Picture(index, seed, pixels, settings)
    if failed:
        raise RenderError(f"{len(failed)} of {len(request.seeds)} pictures could not be made: {failed[0]}")


@dataclass(frozen=True, eq=False)
class _Told:
    """What an expert is told of a batch: the prompt, a row for each picture, and the negative prompt, one row."""

    prompt: Conditioning
    negative: Conditioning
    overflow: dict[str, str]


def _encode(model: Model, request: Request, part: Round) -> dict[str, _Told]:
    """What each expert is told in a round; the same object for those that read prompts alike."""
    told: dict[Encode, _Told] = {}
    for encode in dict.fromkeys(model.readers.values()):
        prompt, negative = encode(request.text(part))
        overflow = prompt.overflow[0] | {f"negative {name}": words for name, words in negative.overflow[0].items()}
        told[encode] = _Told(repeated(prompt.conditioning, len(request.seeds)), negative.conditioning, overflow)
    return {name: told[encode] for name, encode in model.readers.items()}


def _denoise(
    model: Model,
    request: Request,
    part: Round,
    told: Mapping[str, _Told],
    schedule: SigmaSchedule,
    start: Start,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[str, Step]]:
    """A round's steps, each with the name of the expert that took it."""
    residuals = model.controls.residuals(request.control, schedule, part.first)
    experts = model.experts.table(schedule.timestep_at, added=model.adapters.unets, tile=request.tile, residuals=residuals)
    guidance, sampler = guidance_policy(model.folder, request), sampler_info(request.sampler)
    fresh = noise_source(generators, round_shape(model.folder, part), model.place.device)
    options = {} if request.eta is None else {"eta": request.eta}
    x, rows = start.latents, [request] * len(request.seeds)
    for first, end in stages(schedule.sigmas, experts.borders, part.first):
        said = told[experts.expert_for(float(schedule.sigmas[first])).name]
        guided = partial(GuidedDenoiser(experts, guidance, said.negative), conditioning=showing(said.prompt, start, rows, part))
        denoise = keeping(guided, start.kept, float(schedule.sigmas[part.first]))
        for step in islice(sampler.function(denoise, x, schedule.sigmas, fresh, borders=experts.borders, first=first, **options), end - first):
            x = step.x
            yield experts.expert_for(step.sigma).name, step


def guidance_policy(folder: ModelFolder, request: Request) -> Guidance:
    """The guidance that a request asks for, with the experts' own scales where it names none."""
    scales = [(e.sigma_min, e.sigma_max, e.guidance) for e in folder.experts]
    return Guidance(
        scale=expert_scale(scales, request.guidance) if request.expert_guidance else request.guidance,
        interval=(0.0, float("inf")) if request.guidance_interval is None else request.guidance_interval,
        rescale=request.guidance_rescale,
        rescale_space=folder.noise.prediction_type,
        apg=Apg() if request.apg else None,
        threshold=request.dynamic_threshold,
    )


def words_lost(overflow: Mapping[str, str], strict: bool) -> dict[str, str]:
    """The words beyond each encoder's limit, each shortened to 200 characters.

    Raises:
        UsageError: there are some, and `strict` refuses them.
    """
    lost = {name: words if len(words) <= 200 else words[:199] + "…" for name, words in overflow.items() if words}
    if lost and strict:
        name, words = next(iter(lost.items()))
        raise UsageError(f"the words {words!r} do not fit the text encoder {name}; shorten the prompt, or leave out --strict.")
    return lost
