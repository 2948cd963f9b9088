"""What is asked for: every setting of a batch of pictures, and the rounds, steps and batches that follow from it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..text_encoders.prompts import Reading, Text, joined, looks_weighted
from .adapters.adapters import LoraUse
from .adapters.embeddings import EmbeddingUse
from .editing.control import Control
from .editing.edits import Edit, Upscale
from .editing.inputs import InputPicture

BATCH_PIXELS = 4 * 512 * 512
BATCH_PICTURES = 16
DRAWING = ("width", "height", "steps", "sampler", "schedule", "sigmas", "eta")
GUIDING = ("guidance_rescale", "guidance_interval", "apg", "dynamic_threshold")  # beside the scale, which may be the experts' own
READING = ("syntax", "long_prompts", "clip_weight", "t5_weight")
"""Fields of `Request` that plans, replay and galleries treat alike: `resolve` takes them, and pictures record them, under these names as they are."""
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


def most_together(request: Request) -> int:
    """How many pictures of a request are computed together."""
    last = rounds(request)[-1]
    return max(1, min(BATCH_PICTURES, BATCH_PIXELS // (last.width * last.height)))


def batches(request: Request) -> list[Request]:
    """Split into batches of at most 16 pictures and a million pixels, which fits the memory of any machine that can run the model at all."""
    size = most_together(request)
    return [replace(request, seeds=request.seeds[i : i + size]) for i in range(0, len(request.seeds), size)]
