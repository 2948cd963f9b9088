"""Whether a model can do what a request asks for."""

import math
from collections.abc import Sequence

from ..errors import UsageError
from ..schedulers.registry import SAMPLERS
from ..schedulers.schedules import SPACINGS, make_schedule
from ..text_encoders.prompts import parse
from .editing.control import KINDS, kept_steps
from .limits import CHOICES, RANGES, checked_text
from .model.folder import T5_ADDED, ModelFolder
from .request import Request, first_step, rounds


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
        takers = {"clip-t5"} if name == "clip-weight" else {"clip-t5", *T5_ADDED.values()}
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
