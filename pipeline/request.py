"""What is asked for: every setting of a batch of pictures, resolved against the model's defaults and checked before any weight is loaded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..schedulers.registry import SAMPLERS, sampler_info
from ..schedulers.schedules import SPACINGS, make_schedule
from .adapters import LoraUse
from .embeddings import EmbeddingUse
from .folder import ModelFolder
from .limits import RANGES, checked_text

BATCH_PIXELS = 4 * 512 * 512
BATCH_PICTURES = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch of pictures of one prompt; nothing is left to a default.

    Attributes:
        prompt: 1 to 4000 characters.
        negative: what the pictures should not show; "" for none.
        seeds: one a picture, 0..2³²−1.
        width: pixels, a multiple of `ModelFolder.factor`.
        height: pixels, likewise.
        steps: 1..1000.
        sampler: a name in `schedulers.registry.SAMPLERS`.
        schedule: a name in `schedulers.schedules.SPACINGS`.
        sigmas: custom noise levels, falling, for schedule "custom"; else None.
        eta: 0..1, share of fresh noise in each step; None for a sampler that has no such setting.
        guidance: s of uncond + s·(cond − uncond); 1 is none.
        expert_guidance: an expert that brings its own scale uses that instead.
        guidance_rescale: 0..1 (Lin et al. 2023, arXiv 2305.08891, section 3.4).
        guidance_interval: (low, high] in sigma, outside of which there is no guidance; None is everywhere.
        apg: adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416) with the paper's weights.
        dynamic_threshold: percentile in (0, 1] of |x0| that each prediction is clamped to and divided by (Saharia et al. 2022), or None.
        strict: refuse words that do not fit the text encoders, instead of naming them.
        loras: LoRAs that are added to the weights.
        embeddings: embeddings whose words stand in the prompt or the negative prompt.
    """

    prompt: str
    negative: str
    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    sampler: str
    schedule: str
    sigmas: tuple[float, ...] | None
    eta: float | None
    guidance: float
    expert_guidance: bool
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    apg: bool
    dynamic_threshold: float | None
    strict: bool
    loras: tuple[LoraUse, ...]
    embeddings: tuple[EmbeddingUse, ...]


def resolve(
    folder: ModelFolder,
    prompt: str,
    seeds: Iterable[int],
    *,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    guidance: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    apg: bool = False,
    dynamic_threshold: float | None = None,
    strict: bool = False,
    loras: Iterable[LoraUse] = (),
    embeddings: Iterable[EmbeddingUse] = (),
) -> Request:
    """Fill in the model's defaults and check every value; the arguments are the fields of `Request`, None is the model's default.

    Where the sampler is named but not the schedule, the model's schedule is kept if the sampler has a use for it, else the sampler's own is taken.

    Raises:
        UsageError: a value that cannot be used, with what was wanted.
    """
    own = folder.defaults
    sampler = own.sampler if sampler is None else sampler
    info = sampler_info(sampler)
    if schedule is None and sigmas is None:
        schedule = own.schedule if info.spacings is None or own.schedule in info.spacings else info.default_spacing
    if steps is None:
        steps = own.steps if sigmas is None else len([sigma for sigma in sigmas if sigma != 0])
    request = Request(
        prompt=checked_text("the prompt", prompt),
        negative=checked_text("the negative prompt", negative) if negative else "",
        seeds=tuple(seeds),
        width=own.width if width is None else width,
        height=own.height if height is None else height,
        steps=steps,
        sampler=sampler,
        schedule="custom" if schedule is None else schedule,
        sigmas=None if sigmas is None else tuple(sigmas),
        eta=0.0 if eta is None and "eta" in info.options else eta,
        guidance=own.guidance if guidance is None else guidance,
        expert_guidance=guidance is None,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval,
        apg=apg,
        dynamic_threshold=dynamic_threshold,
        strict=strict,
        loras=tuple(loras),
        embeddings=tuple(one for one in embeddings if one.named_in(prompt, negative)),
    )
    _check(folder, request)
    return request


def batches(request: Request) -> list[Request]:
    """Split into batches of at most 16 pictures and a million pixels, which fits the memory of any machine that can run the model at all."""
    size = max(1, min(BATCH_PICTURES, BATCH_PIXELS // (request.width * request.height)))
    return [replace(request, seeds=request.seeds[i : i + size]) for i in range(0, len(request.seeds), size)]


def _check(folder: ModelFolder, request: Request) -> None:
    for name, side in (("width", request.width), ("height", request.height)):
        _within(name, side, folder.factor, RANGES[name][1])
        if side % folder.factor:
            below = side - side % folder.factor
            near = f"{below} and {below + folder.factor}"
            raise UsageError(f"--{name} {side} is not a multiple of {folder.factor}, which this model needs; the nearest that fit are {near}.")
    _one_of("schedule", request.schedule, SPACINGS)
    _within("steps", request.steps, *RANGES["steps"])
    _within("guidance", request.guidance, *RANGES["guidance"])
    _within("guidance-rescale", request.guidance_rescale, *RANGES["guidance_rescale"])
    for seed in request.seeds:
        _within("seed", seed, *RANGES["seed"])
    if request.eta is not None:
        _within("eta", request.eta, *RANGES["eta"])
        takers = [name for name, info in SAMPLERS.items() if "eta" in info.options]
        if request.sampler not in takers:
            raise UsageError(f"--eta has no meaning for the sampler {request.sampler}; it is a setting of {', '.join(takers)}.")
    interval = request.guidance_interval
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise UsageError(f"--guidance-interval {interval[0]:g},{interval[1]:g} is empty; give two sigmas, the lower one first.")
    if request.dynamic_threshold is not None:
        _within("dynamic-threshold", request.dynamic_threshold, *RANGES["dynamic_threshold"])
    make_schedule(folder.noise, request.sampler, request.steps, spacing=request.schedule, sigmas=request.sigmas)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"--{name} {value:g} is out of range; give a number from {low:g} to {high:g}.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"--{name} {value!r} is not known; use one of {', '.join(known)}.")
