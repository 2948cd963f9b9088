"""A batch on its way from prompts to pictures: begin, advance stage by stage, finish.

A `Draft` is plain data on the CPU between two stages (`schedulers.step.stages`: what one expert does of a run). So a batch can wait at a border
while others use the same expert, be kept on disk, and be tried again from the stage's beginning.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import RenderError, UsageError
from ..pipeline.request import Request
from ..pipeline.seeds import draw, noise_source, streams
from ..pipeline.text_to_image import applied_settings, guidance_policy, words_lost
from ..schedulers.guidance import GuidedDenoiser, stack_conditionings
from ..schedulers.registry import sampler_info
from ..schedulers.schedules import SigmaSchedule, make_schedule
from ..schedulers.step import stages
from ..unet.experts import ExpertTable
from ..vae.codec import to_uint8
from .items import Item
from .studio import Said, Studio, on_device


@dataclass(frozen=True, eq=False)
class Drawn:
    """A finished picture: (height, width, 3) uint8, and the settings that its file carries."""

    item: Item
    pixels: Tensor
    settings: dict[str, Any]


@dataclass(frozen=True)
class Lost:
    """An item that could not be drawn, and why."""

    item: Item
    error: str


@dataclass(frozen=True)
class Stepped:
    """A denoising step of a batch is done: by which expert, of how many pictures."""

    expert: str
    pictures: int


@dataclass(frozen=True, eq=False)
class Draft:
    """A batch between two stages.

    Attributes:
        items: its rows.
        said: for each row, what each expert is told.
        schedule: its noise levels.
        latents: (rows, channels, h, w) float32, in the variance-exploding scale.
        noise: states of the rows' noise streams.
        stage: stages that are done.
        used: (expert, sigma, next sigma) of the steps that are done.
        lost: rows that were given up on the way.
        fallbacks: what had to be done differently.
    """

    items: tuple[Item, ...]
    said: tuple[Mapping[str, Said], ...]
    schedule: SigmaSchedule
    latents: Tensor
    noise: tuple[Tensor, ...]
    stage: int = 0
    used: tuple[tuple[str, float, float], ...] = ()
    lost: tuple[Lost, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        """What all rows have in common: all but prompts, seed and guidance scale."""
        return self.items[0].request

    @property
    def bytes(self) -> int:
        """What it takes in memory; a text that several rows share counts once."""
        told = {id(said): said for row in self.said for said in row.values()}.values()
        parts = [part for said in told for one in (said.prompt, said.negative) for part in (one.tokens, one.pooled) if part is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.latents, *self.noise, *parts))

    def next_expert(self, experts: ExpertTable) -> str | None:
        """The expert of its next stage; None when all are done, or no row is left."""
        parts = stages(self.schedule.sigmas, experts.borders)
        return None if self.stage == len(parts) or not self.items else experts.expert_for(float(self.schedule.sigmas[parts[self.stage][0]])).name

    def rows(self, first: int, end: int) -> "Draft":
        """Some of its rows, as a draft of their own."""
        cut = slice(first, end)
        return replace(self, items=self.items[cut], said=self.said[cut], latents=self.latents[cut], noise=self.noise[cut], lost=())


@torch.no_grad()
def begin(studio: Studio, items: Sequence[Item]) -> Draft:
    """Encode the prompts of a batch and draw its noise.

    Items whose prompt cannot be read (words beyond the limits in a strict request, out of memory) are lost; the others are drawn without them.
    """
    said: list[Mapping[str, Said]] = []
    lost: list[Lost] = []
    rows: list[Item] = []
    for item in items:
        try:
            read = studio.read(item.request)
            words_lost(_overflow(read), item.request.strict)
        except UsageError as error:
            lost.append(Lost(item, str(error)))
            continue
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            free_memory(studio.place.device)
            lost.append(Lost(item, f"{studio.place.device.type} ran out of memory reading the prompt; free some, then run again."))
            continue
        said.append(read)
        rows.append(item)
    request, folder = items[0].request, studio.folder
    schedule = make_schedule(folder.noise, request.sampler, request.steps, spacing=request.schedule, sigmas=request.sigmas)
    shape = (folder.channels, request.height // folder.factor, request.width // folder.factor)
    generators = streams([item.seed for item in rows])
    latents = draw(generators, shape) * schedule.initial_scale if rows else torch.empty(0, *shape)
    return Draft(tuple(rows), tuple(said), schedule, latents, tuple(g.get_state() for g in generators), lost=tuple(lost))


@torch.no_grad()
def advance(studio: Studio, draft: Draft, tell: Callable[[Stepped], None]) -> Draft:
    """Do the next stage of a batch: all the steps of one expert.

    Out of memory, the rows are halved down to one, which is then lost; each half has the same noise as before.

    Raises:
        TuDiffuseError: the expert cannot be loaded.
    """
    try:
        return _advanced(studio, draft, tell)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = f"{studio.place.device.type} ran out of memory at one picture of {draft.request.width}×{draft.request.height}; make it smaller."
    free_memory(studio.place.device)
    if len(draft.items) == 1:
        return replace(draft.rows(0, 0), stage=draft.stage + 1, lost=(*draft.lost, Lost(draft.items[0], reason)))
    half = len(draft.items) // 2
    first, second = (advance(studio, draft.rows(*cut), tell) for cut in ((0, half), (half, len(draft.items))))
    return replace(
        first,
        items=first.items + second.items,
        said=first.said + second.said,
        latents=torch.cat([first.latents, second.latents]),
        noise=first.noise + second.noise,
        used=max(first.used, second.used, key=len),
        lost=(*draft.lost, *first.lost, *second.lost),
        fallbacks=tuple(dict.fromkeys((*first.fallbacks, *second.fallbacks, "batch-halved"))),
    )


def _advanced(studio: Studio, draft: Draft, tell: Callable[[Stepped], None]) -> Draft:
    request, schedule, device = draft.request, draft.schedule, studio.place.device
    experts = studio.table(schedule, request.loras)
    first, end = stages(schedule.sigmas, experts.borders)[draft.stage]
    owner = experts.expert_for(float(schedule.sigmas[first]))
    told = [said[owner.name] for said in draft.said]
    prompt = on_device(stack_conditionings([said.prompt for said in told]), device)
    negative = on_device(stack_conditionings([said.negative for said in told]), device)
    scales = [owner.guidance if item.request.expert_guidance and owner.guidance is not None else item.request.guidance for item in draft.items]
    guidance = replace(guidance_policy(studio.folder, request), scale=torch.tensor(scales, dtype=torch.float64))
    generators = tuple(torch.Generator("cpu").set_state(state) for state in draft.noise)
    steps = sampler_info(request.sampler).function(
        partial(GuidedDenoiser(experts, guidance, negative), conditioning=prompt),
        draft.latents.to(device),
        schedule.sigmas,
        noise_source(generators, (draft.latents.shape[1], draft.latents.shape[2], draft.latents.shape[3]), device),
        borders=experts.borders,
        first=first,
        **({} if request.eta is None else {"eta": request.eta}),
    )
    latents, used = draft.latents, list(draft.used)
    for step in islice(steps, end - first):
        latents = step.x
        name = experts.expert_for(step.sigma).name
        used.append((name, step.sigma, step.sigma_next))
        tell(Stepped(name, len(draft.items)))
    noise = tuple(generator.get_state() for generator in generators)
    return replace(draft, latents=latents.cpu(), noise=noise, stage=draft.stage + 1, used=tuple(used))


@torch.no_grad()
def finish(studio: Studio, draft: Draft) -> Iterator[Drawn | Lost]:
    """Decode a batch whose stages are all done, one picture at a time; one that is not finite is lost, its neighbours are not."""
    yield from draft.lost
    codec = studio.codec()
    for row, item in enumerate(draft.items):
        try:
            decoded = codec.decode(draft.latents[row : row + 1].to(studio.place.device) * draft.schedule.final_scale)
        except RenderError as error:
            yield Lost(item, str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            free_memory(studio.place.device)
            yield Lost(item, f"{studio.place.device.type} ran out of memory decoding {item.request.width}×{item.request.height}; make it smaller.")
            continue
        truncated = words_lost(_overflow(draft.said[row]), strict=False)
        fallbacks = [*studio.fallbacks, *draft.fallbacks, *decoded.fallbacks[0]]
        settings = applied_settings(studio.folder, studio.place, item.request, item.seed, list(draft.used), truncated, fallbacks)
        yield Drawn(item, to_uint8(decoded.pixels)[0].cpu(), settings | {"item": item.key, "company": len(draft.items) - 1})


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _overflow(said: Mapping[str, Said]) -> dict[str, str]:
    return {name: words for one in said.values() for name, words in one.overflow.items()}
