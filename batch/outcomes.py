"""What became of the items of a plan, as people are shown it: by contact sheet and gallery."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..model_files import within_single_file
from ..pipeline.model.folder import EMBEDDED, ModelFolder
from ..pipeline.request import DRAWING, GUIDING, READING, Request
from ..pipeline.resolve import resolve
from .items import Item
from .journal import Entry, read_journal
from .plan import Plan

Value = str | int | float

_TUNED = (*DRAWING, "guidance", *GUIDING, "strict", *READING)
_OFF = ("none", "off")


@dataclass(frozen=True)
class Outcome:
    """An item and what became of it.

    Attributes:
        item: what was asked for, with the seed of the candidate that was kept.
        entry: its last line in the journal; None while it is not drawn, or where its picture has gone.
        settings: name -> value of all that decides the picture but prompt and model, and `score` where there is one; "none" and "off" for
            what is not used.
    """

    item: Item
    entry: Entry | None
    settings: Mapping[str, Value]

    @property
    def file(self) -> str | None:
        """Its picture, relative to the folder; None where there is none."""
        return None if self.entry is None else self.entry.file

    @property
    def error(self) -> str | None:
        """Why it failed; None if it did not."""
        return None if self.entry is None else self.entry.error


def outcomes(folder: ModelFolder, plan: Plan, out: Path) -> list[Outcome]:
    """What is known of each item that is asked for, in the order of the prompt file; of a line, seed after seed."""
    written = read_journal(out)
    found: list[Outcome] = []
    for planned in sorted(plan.wanted, key=lambda planned: (planned.item.line, planned.item.seed)):
        entry = written.get(planned.item.key)
        if entry is not None and entry.file is not None and not (out / entry.file).is_file():
            entry = None
        item = _kept(planned.item, entry)
        found.append(Outcome(item, entry, _settings(folder, item, entry)))
    return found


def _kept(item: Item, entry: Entry | None) -> Item:
    """The item with the seed of the candidate that was kept."""
    if entry is None or not entry.scores:
        return item
    seed = next(int(seed) for seed, score in entry.scores.items() if score == entry.score)
    return replace(item, request=replace(item.request, seeds=(seed,)))


def usual_settings(found: Sequence[Outcome]) -> dict[str, Value]:
    """The settings that more than half of the outcomes have; captions name what differs from them."""
    counts = Counter(setting for outcome in found for setting in outcome.settings.items())
    return {name: value for (name, value), times in counts.items() if times > len(found) / 2}


def head_line(folder: ModelFolder, usual: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Model and usual settings, without those that are off."""
    return [("model", folder.name), *((name, value) for name, value in usual.items() if value not in _OFF)]


def shared_arguments(folder: ModelFolder, **circumstances: str) -> list[str]:
    """The arguments of `generate` that all pictures of a run share: the model by its name (paths stay private), and what is not usual."""
    name = folder.name if folder.commit is None else f"{folder.name}@{folder.commit}"
    model = [] if folder.path == EMBEDDED else ["--model", name]
    model += [] if within_single_file(folder.path) is None else ["--prediction-type", folder.noise.prediction_type]
    model += [] if folder.variant is None else ["--variant", folder.variant]
    return model + [part for name, value in circumstances.items() if value not in ("auto", "none") for part in (f"--{name}", value)]


def generate_commands(folder: ModelFolder, items: Iterable[Item], shared: Sequence[str]) -> list[str]:
    """For each item the command that makes its picture, for a POSIX shell: everything that is not the model's default is said.

    Its pixels are those of the batch within 2 of 255; `replay` draws the picture in its batch's company again.

    Args:
        folder: the model.
        items: of the batch.
        shared: from `shared_arguments`.
    """
    told = cache(partial(_told, folder))
    return [_command(item, told(replace(item.request, prompt="-", negative="", seeds=(0,), embeddings=(), template=None)), shared) for item in items]


def _command(item: Item, told: Iterable[str], shared: Sequence[str]) -> str:
    request = item.request
    options = [part for name in told for part in _argument(name, getattr(request, name))]
    options += [part for name, value in _edit_options(request).items() for part in _argument(name, value)]
    negative = ["--negative", request.negative] if request.negative else []
    picture_format = [] if item.picture_format == "png" else ["--format", item.picture_format]
    adapters = [part for one in (*request.loras, *request.embeddings) for part in (one.option, one.spec)]
    tail = [*negative, "--seed", str(item.seed), *options, *adapters, *picture_format, *shared]
    if request.prompt == "-":  # which generate takes for standard input
        return f"echo - | {shlex.join(['tu-diffuse', 'generate', '-', *tail])}"
    if request.prompt.startswith("-"):
        return shlex.join(["tu-diffuse", "generate", *tail, "--", request.prompt])
    return shlex.join(["tu-diffuse", "generate", request.prompt, *tail])


def _told(folder: ModelFolder, request: Request) -> tuple[str, ...]:
    """The options that `resolve` must be given to come to a request."""
    edit = request.edit
    request = replace(request, edit=None, upscale=None, tile=None, control=None)  # which `_edit_options` tells
    given: dict[str, Any] = {name: getattr(request, name) for name in _TUNED}
    if request.sigmas is not None:
        del given["schedule"], given["steps"]
    if request.expert_guidance:
        del given["guidance"]
    for name in list(given):
        fewer = {other: value for other, value in given.items() if other != name}
        with suppress(UsageError):  # what is left may contradict each other
            if resolve(folder, request.prompt, request.seeds, loras=request.loras, embeddings=request.embeddings, **fewer) == request:
                given = fewer
    if edit is not None:
        own_size = (request.width, request.height) == (edit.init_image.width, edit.init_image.height)
        return (*(() if own_size else ("width", "height")), *(name for name in given if name not in ("width", "height")))
    return tuple(given)


def _edit_options(request: Request) -> dict[str, Any]:
    """The options of what a picture is made from beside a prompt; files by their names, as paths stay private."""
    edit, upscale, control = request.edit, request.upscale, request.control
    told: dict[str, Any] = {}
    if edit is not None:
        told |= {"init_image": edit.init_image.name, "strength": edit.strength, "resize": edit.resize}
        told |= {} if edit.mask is None else {"mask": edit.mask.name, "mask_blur": edit.mask_blur}
    if upscale is not None:
        told |= {"upscale": upscale.factor, "upscale_mode": upscale.mode, "upscale_steps": upscale.steps, "upscale_strength": upscale.strength}
    if control is not None:
        told |= {"control": control.kind, "control_image": control.image.name, "control_model": control.model}
        told |= {"control_scale": control.scale, "control_start": control.start, "control_end": control.end}
        told |= {} if control.estimator is None else {"control_depth_model": control.estimator.name}
    return told if request.tile is None else {**told, "tile": request.tile}


def _argument(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    parts = value if isinstance(value, tuple) else (value,)
    return [option, ",".join(part if isinstance(part, str) else repr(part).removesuffix(".0") for part in parts)]


def _settings(folder: ModelFolder, item: Item, entry: Entry | None) -> dict[str, Value]:
    request = item.request
    own_scale = request.expert_guidance and any(expert.guidance is not None for expert in folder.experts)
    values: dict[str, Any] = {
        "seed": item.seed,
        "size": f"{request.width}×{request.height}",
        "steps": request.steps,
        "sampler": request.sampler,
        "schedule": request.schedule,
        "sigmas": request.sigmas,
        "guidance": "the experts’" if own_scale else request.guidance,
        "guidance rescale": request.guidance_rescale or None,
        "guidance interval": request.guidance_interval,
        "apg": request.apg,
        "dynamic threshold": request.dynamic_threshold,
        "eta": request.eta,
        "syntax": None if request.syntax == "plain" else request.syntax,
        "long prompts": None if request.long_prompts == "chunk" else request.long_prompts,
        "CLIP weight": None if request.clip_weight == 1 else request.clip_weight,
        "T5 weight": None if request.t5_weight == 1 else request.t5_weight,
        "negative": request.negative or None,
        "lora": ", ".join(lora.spec for lora in request.loras) or None,
        "embedding": ", ".join(one.spec for one in request.embeddings) or None,
        **{name.replace("_", " "): value for name, value in _edit_options(request).items()},
        "format": item.picture_format,
    }
    if entry is not None and entry.score is not None:
        values["score"] = entry.score
    return {name: _shown(value) for name, value in values.items()}


def _shown(value: Any) -> Value:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
