"""From what a person asks for to a request: the model's defaults filled in, every value checked before any weight is loaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..schedulers.registry import sampler_info
from ..text_encoders.prompts import choose
from .adapters.adapters import LoraUse
from .adapters.embeddings import EmbeddingUse
from .checks import check
from .editing.control import Control, resolved_control
from .editing.edits import Edit, Upscale, resolved_edit, resolved_upscale
from .limits import checked_text
from .model.folder import ModelFolder
from .request import Request


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
