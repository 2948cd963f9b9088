"""What is asked for: every setting of a batch of pictures, resolved against the model's defaults and checked before any weight is loaded."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..schedulers.registry import SAMPLERS, sampler_info
from ..schedulers.schedules import SPACINGS, make_schedule
from ..text_encoders.prompts import Reading, Text, choose, joined, looks_weighted, parse
from .adapters.adapters import LoraUse
from .adapters.embeddings import EmbeddingUse
from .editing.control import KINDS, Control, kept_steps, resolved_control
from .editing.edits import Edit, Upscale, resolved_edit, resolved_upscale
from .editing.inputs import InputPicture
from .folder import ModelFolder
from .limits import CHOICES, RANGES, checked_text

BATCH_PIXELS = 4 * 512 * 512
BATCH_PICTURES = 16
EARLIER: Mapping[str, Any] = {
    "loras": (),
    "embeddings": (),
    "syntax": "plain",
    "long_prompts": "truncate",
    "clip_weight": 1.0,
    "t5_weight": 1.0,
    "template": None,
}
"""What pictures and plans mean that were made before a setting was there, and therefore lack it."""


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
        edit: a picture to begin with, or None.
        upscale: a second round on the enlarged drawing, or None.
        tile: "x", "y" or "xy", along which the picture meets itself when it is laid side by side; None for no such thing.
        syntax: "plain", or "weighted": prompts are read by `text_encoders.prompts.parse`.
        long_prompts: "chunk": CLIP reads as many chunks as a prompt takes; "truncate": one.
        clip_weight: 0..10, how much CLIP's tokens count beside T5's; see `Conditioner`.
        t5_weight: the same of T5's, which is neither loaded nor run at 0.
        template: prompt and negative prompt as they were before choices were made for these seeds; None where there were none.
        control: what steers the drawing through a ControlNet, or None.
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
    syntax: str
    long_prompts: str
    clip_weight: float
    t5_weight: float
    template: tuple[str, str] | None
    edit: Edit | None = None
    upscale: Upscale | None = None
    tile: str | None = None
    control: Control | None = None

    @property
    def reading(self) -> Reading:
        """How the prompts are read."""
        return Reading(self.syntax == "weighted", self.long_prompts == "chunk", self.clip_weight, self.t5_weight)

    def text(self, part: "Round") -> Text:
        """What the text encoders are told for a round."""
        return Text(self.prompt, self.negative, part.width, part.height, self.reading)

    @property
    def seems_weighted(self) -> bool:
        """Whether a prompt of plain syntax holds what would be a weight in the other."""
        return self.syntax == "plain" and (looks_weighted(self.prompt) or looks_weighted(self.negative))

    @property
    def words(self) -> str:
        """The prompt without its syntax."""
        return joined(self.reading.parts(self.prompt)).text


@dataclass(frozen=True)
class Round:
    """One run of the sampler through its schedule.

    Attributes:
        width: pixels.
        height: likewise.
        steps: of the schedule.
        first: number of the step that it begins with.
    """

    width: int
    height: int
    steps: int
    first: int


def rounds(request: Request) -> list[Round]:
    """The rounds of a request: one, or two where the picture is enlarged."""
    edit, upscale = request.edit, request.upscale
    first = Round(request.width, request.height, request.steps, 0 if edit is None else first_step(request.steps, edit.strength))
    if upscale is None:
        return [first]
    width, height = (round(side * upscale.factor) for side in (request.width, request.height))
    return [first, Round(width, height, upscale.steps, first_step(upscale.steps, upscale.strength))]


def steps_of(request: Request) -> int:
    """How many steps are taken, in all rounds."""
    return sum(part.steps - part.first for part in rounds(request))


def first_step(steps: int, strength: float) -> int:
    """Number of the first of the last ⌊steps·strength⌋ steps, as diffusers' img2img counts them."""
    return steps - min(int(steps * strength), steps)


def with_pictures(request: Request, change: Callable[[InputPicture], InputPicture]) -> Request:
    """The request with each of its input pictures replaced."""
    edit, control = request.edit, request.control
    if control is not None:
        request = replace(request, control=replace(control, image=change(control.image)))
    if edit is None:
        return request
    return replace(request, edit=replace(edit, init_image=change(edit.init_image), mask=None if edit.mask is None else change(edit.mask)))


def recorded(request: Request) -> dict[str, Any]:
    """The fields of a request as JSON: input pictures without their paths, and what is not used left out."""
    fields = asdict(request)
    for name in ("edit", "upscale", "tile", "control"):
        if fields[name] is None:
            del fields[name]
    if request.edit is not None:
        mask = request.edit.mask
        fields["edit"] |= {"init_image": request.edit.init_image.recorded, "mask": None if mask is None else mask.recorded}
    if request.control is not None:
        fields["control"] = request.control.recorded
    return fields


def resolve_all(
    folder: ModelFolder, prompt: str, seeds: Iterable[int], *, negative: str = "", syntax: str = "plain", **settings: Any
) -> list[Request]:
    """As `resolve`, after the choices `{a|b}` of the prompts were made for each seed: one request for each outcome, in the order of the seeds."""
    if syntax == "plain":
        return [resolve(folder, prompt, seeds, negative=negative, **settings)]
    template = (checked_text("the prompt", prompt), negative)
    chosen: dict[tuple[str, str], list[int]] = {}
    for seed in seeds:
        chosen.setdefault((choose(prompt, seed, "prompt"), choose(negative, seed, "negative")), []).append(seed)
    return [
        resolve(folder, texts[0], alike, negative=texts[1], syntax=syntax, template=None if texts == template else template, **settings)
        for texts, alike in chosen.items()
    ]


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
    init_image: Path | str | None = None,
    strength: float | None = None,
    resize: str | None = None,
    mask: Path | str | None = None,
    mask_blur: float | None = None,
    edit: Edit | None = None,
    upscale: float | Upscale | None = None,
    upscale_mode: str | None = None,
    upscale_steps: int | None = None,
    upscale_strength: float | None = None,
    tile: str | None = None,
    syntax: str = "plain",
    long_prompts: str = "chunk",
    clip_weight: float = 1.0,
    t5_weight: float = 1.0,
    no_t5: bool = False,
    template: tuple[str, str] | None = None,
    control: str | Control | None = None,
    control_image: Path | str | None = None,
    control_model: Path | str | None = None,
    control_scale: float | None = None,
    control_start: float | None = None,
    control_end: float | None = None,
    control_depth_model: Path | str | None = None,
) -> Request:
    """Fill in the model's defaults and check every value; the arguments are the fields of `Request`, None is the model's default.

    The arguments of an edit and of an enlargement are those of `edits.resolved_edit` and `edits.resolved_upscale`; a picture to begin with gives
    the size where none is named. A recorded `Edit`, `Upscale` or `Control` stands in place of its parts.

    `no_t5` is the same as a `t5_weight` of 0.

    Where the sampler is named but not the schedule, the model's schedule is kept if the sampler has a use for it, else the sampler's own is taken.

    Raises:
        UsageError: a value that cannot be used, with what was wanted.
        DataError: a picture to begin with, or its mask, is not a valid one.
    """
    own = folder.defaults
    sampler = own.sampler if sampler is None else sampler
    info = sampler_info(sampler)
    if schedule is None and sigmas is None:
        schedule = own.schedule if info.spacings is None or own.schedule in info.spacings else info.default_spacing
    if steps is None:
        steps = own.steps if sigmas is None else len([sigma for sigma in sigmas if sigma != 0])
    if edit is None:
        edit = resolved_edit(_path(init_image), strength, resize, _path(mask), mask_blur)
    if edit is not None and (width is None) != (height is None):
        raise UsageError("one of --width and --height is given for --init-image; give both, or neither to keep the picture's own size.")
    steered = None
    if not isinstance(control, Control):
        shares, networks = (control_start, control_end), (_path(control_model), _path(control_depth_model))
        steered = resolved_control(folder, _path(control_image), control, networks[0], control_scale, *shares, networks[1])
    size = (own.width, own.height) if edit is None else (edit.init_image.width, edit.init_image.height)
    request = Request(
        prompt=checked_text("the prompt", prompt),
        negative=checked_text("the negative prompt", negative) if negative else "",
        seeds=tuple(seeds),
        width=size[0] if width is None else width,
        height=size[1] if height is None else height,
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
        edit=edit,
        upscale=upscale if isinstance(upscale, Upscale) else resolved_upscale(upscale, upscale_mode, upscale_steps, upscale_strength, steps),
        tile=tile,
        syntax=syntax,
        long_prompts=long_prompts,
        clip_weight=float(clip_weight),
        t5_weight=0.0 if no_t5 else float(t5_weight),
        template=template,
        control=control if isinstance(control, Control) else steered,
    )
    if no_t5 and t5_weight not in (0, 1):
        raise UsageError(f"--no-t5 stands beside --t5-weight {t5_weight:g}; leave one of them out.")
    check(folder, request)
    return request


def _path(name: Path | str | None) -> Path | None:
    return None if name is None else Path(name)


def most_together(request: Request) -> int:
    """How many pictures of a request are computed together."""
    last = rounds(request)[-1]
    return max(1, min(BATCH_PICTURES, BATCH_PIXELS // (last.width * last.height)))


def batches(request: Request) -> list[Request]:
    """Split into batches of at most 16 pictures and a million pixels, which fits the memory of any machine that can run the model at all."""
    size = most_together(request)
    return [replace(request, seeds=request.seeds[i : i + size]) for i in range(0, len(request.seeds), size)]


def check(folder: ModelFolder, request: Request) -> None:
    """Check every value of a request against the model.

    Raises:
        UsageError: a value that cannot be used, with what was wanted.
    """
    for name, side in (("width", request.width), ("height", request.height)):
        _within(name, side, folder.factor, RANGES[name][1])
        if side % folder.factor:
            below = side - side % folder.factor
            near = f"{below} and {below + folder.factor}" if below else f"{folder.factor}"
            whose = "" if request.edit is None or side != getattr(request.edit.init_image, name) else f" of {request.edit.init_image.name}"
            raise UsageError(f"--{name} {side}{whose} is not a multiple of {folder.factor}, which this model needs; the nearest that fit are {near}.")
    _check_edit(folder, request)
    _one_of("schedule", request.schedule, SPACINGS)
    _one_of("syntax", request.syntax, CHOICES["syntax"])
    _one_of("long-prompts", request.long_prompts, CHOICES["long_prompts"])
    _check_texts(folder, request)
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


def _check_texts(folder: ModelFolder, request: Request) -> None:
    if request.syntax == "weighted":
        parse(request.negative)
        checked_text("the prompt without its brackets", request.words)
    for name, weight in (("clip-weight", request.clip_weight), ("t5-weight", request.t5_weight)):
        _within(name, weight, *RANGES[name.replace("-", "_")])
        takers = {"clip-t5"} if name == "clip-weight" else {"clip-t5", "sd-t5"}
        if weight != 1 and not takers & folder.families:
            option = "--no-t5" if (name, weight) == ("t5-weight", 0) else f"--{name}"
            raise UsageError(f"{option} has no meaning for {folder.name!r}, whose text encoders are not CLIP beside T5; leave it out.")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"--{name} {value:g} is out of range; give a number from {low:g} to {high:g}.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"--{name} {value!r} is not known; use one of {', '.join(known)}.")


def _check_edit(folder: ModelFolder, request: Request) -> None:
    """Check the edit, the second round and the tiling."""
    edit, upscale = request.edit, request.upscale
    if folder.inpaints and (edit is None or edit.mask is None):
        raise UsageError(f"the model {folder.name!r} only repaints parts of pictures; give --init-image and --mask, or another model.")
    if edit is not None:
        _within("strength", edit.strength, *RANGES["strength"])
        _one_of("resize", edit.resize, CHOICES["resize"])
        _within("mask-blur", edit.mask_blur, *RANGES["mask_blur"])
        _some_step("strength", edit.strength, request.steps)
    if upscale is not None:
        _within("upscale", upscale.factor, *RANGES["upscale"])
        _one_of("upscale-mode", upscale.mode, CHOICES["upscale_mode"])
        _within("upscale-steps", upscale.steps, *RANGES["upscale_steps"])
        _within("upscale-strength", upscale.strength, *RANGES["upscale_strength"])
        _some_step("upscale-strength", upscale.strength, upscale.steps)
        for name, side in (("width", request.width), ("height", request.height)):
            if side * upscale.factor % folder.factor or side * upscale.factor > RANGES[name][1]:
                raise UsageError(
                    f"--upscale {upscale.factor:g} makes the {name} {side * upscale.factor:g}; a multiple of {folder.factor} up to "
                    f"{RANGES[name][1]:g} was wanted; choose another factor or size."
                )
        if edit is not None and edit.mask is not None:
            raise UsageError("--upscale would change the pixels that --mask keeps; leave one of them out.")
        if request.sigmas is not None and upscale.steps != request.steps:
            raise UsageError("--upscale-steps and --sigmas contradict each other; leave one of them out.")
    if request.tile is not None:
        _one_of("tile", request.tile, CHOICES["tile"])
    control = request.control
    if control is not None:
        for name, value in (("scale", control.scale), ("start", control.start), ("end", control.end)):
            _within(f"control-{name}", value, *RANGES[f"control_{name}"])
        _one_of("control", control.kind, KINDS)
        for part in rounds(request):
            kept_steps(control, part.steps - part.first)
        if request.tile is not None:
            raise UsageError("--control-image and --tile cannot be used together, as ControlNets see edges; leave one of them out.")


def _some_step(name: str, strength: float, steps: int) -> None:
    if first_step(steps, strength) == steps:
        raise UsageError(f"--{name} {strength:g} of {steps} steps is less than one step; make it larger, or take more steps.")
