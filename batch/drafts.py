"""A batch on its way from prompts to pictures: begin, open a round, advance stage by stage, finish.

A `Draft` is plain data on the CPU between two stages (`schedulers.step.stages`: what one expert does of a round). So a batch can wait at a border
while others use the same expert, be kept on disk, and be tried again from the stage's beginning.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import RenderError, UsageError, out_of_memory
from ..pipeline.editing.inputs import unchanged
from ..pipeline.editing.rounds import Start, composited, keeping, round_schedule, round_shape, showing
from ..pipeline.editing.rounds import begin as begin_round
from ..pipeline.request import Request, Round, rounds, with_pictures
from ..pipeline.seeds import noise_source, streams
from ..pipeline.settings import applied_settings
from ..pipeline.text_to_image import guidance_policy, words_lost
from ..schedulers.guidance import GuidedDenoiser, stack_conditionings
from ..schedulers.registry import sampler_info
from ..schedulers.schedules import SigmaSchedule
from ..schedulers.step import stages
from ..vae.codec import LatentCodec, to_uint8
from .items import Item
from .studio import Said, Studio, on_device

Result = TypeVar("Result")
Settle = Callable[[], bool]
"""Waits until nothing else computes on the device; whether there was anything to wait for."""


def alone() -> bool:
    """Nothing else computes."""
    return False


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
        said: for each row and each round, what each expert is told.
        schedule: noise levels of its round.
        start: where its round began.
        latents: (rows, channels, h, w) float32, in the variance-exploding scale.
        noise: states of the rows' noise streams.
        round: number of the round that is open; -1 before the first.
        stage: stages of the round that are done.
        used: (expert, sigma, next sigma) of the steps that are done.
        lost: rows that were given up on the way.
        fallbacks: what had to be done differently.
    """

    items: tuple[Item, ...]
    said: tuple[tuple[Mapping[str, Said], ...], ...]
    schedule: SigmaSchedule
    start: Start
    latents: Tensor
    noise: tuple[Tensor, ...]
    round: int = -1
    stage: int = 0
    used: tuple[tuple[str, float, float], ...] = ()
    lost: tuple[Lost, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        """What all rows have in common: all but prompts, seed, guidance scale, and the pictures that they begin with."""
        return self.items[0].request

    @property
    def parts(self) -> list[Round]:
        """Its rounds; none when no row is left."""
        return rounds(self.request) if self.items else []

    @property
    def bytes(self) -> int:
        """What it takes in memory; a text that several rows share counts once."""
        told = {id(said): said for row in self.said for read in row for said in read.values()}.values()
        parts = [part for said in told for one in (said.prompt, said.negative) for part in (one.tokens, one.pooled) if part is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.latents, *self.noise, *parts))

    def next_expert(self, studio: Studio) -> str | None:
        """The expert of its next stage; None when all of its round are done, or no row is left."""
        if not self.items:
            return None
        experts = studio.table(self.schedule, self.request, self.parts[self.round])
        parts = stages(self.schedule.sigmas, experts.borders, self.parts[self.round].first)
        return None if self.stage == len(parts) else experts.expert_for(float(self.schedule.sigmas[parts[self.stage][0]])).name

    def rows(self, rows: Sequence[int]) -> "Draft":
        """Some of its rows, as a draft of their own."""
        items, said, noise = (tuple(column[row] for row in rows) for column in (self.items, self.said, self.noise))
        start, latents = self.start.rows(list(rows)), self.latents[list(rows)]
        return replace(self, items=items, said=said, start=start, latents=latents, noise=noise, lost=())


@torch.no_grad()
def begin(studio: Studio, items: Sequence[Item], settle: Settle = alone) -> Draft:
    """Encode the prompts of a batch, for all rounds.

    Items whose prompt cannot be read (words beyond the limits in a strict request, out of memory), or whose pictures are gone, are lost; the others
    are drawn without them.
    """
    said: list[tuple[Mapping[str, Said], ...]] = []
    lost: list[Lost] = []
    rows: list[Item] = []
    for item in items:
        try:
            with_pictures(item.request, unchanged)
            read = tuple(_with_room(partial(studio.read, item.request, part), settle) for part in rounds(item.request))
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
    request = items[0].request
    part = rounds(request)[0]
    nothing = torch.zeros(len(rows), *round_shape(studio.folder, part))
    states = tuple(generator.get_state() for generator in streams([item.seed for item in rows]))
    return Draft(tuple(rows), tuple(said), round_schedule(studio.folder, request, part), Start(nothing), nothing, states, lost=tuple(lost))


@torch.no_grad()
def open_round(studio: Studio, draft: Draft, settle: Settle = alone) -> Draft:
    """Open the next round of a batch: draw its noise, and encode the pictures that it begins with.

    Out of memory, or where the VAE fails, all rows are lost: pictures are encoded one at a time.
    """
    if not draft.items:
        return draft
    number, folder, device = draft.round + 1, studio.folder, studio.place.device
    part = draft.parts[number]
    schedule = round_schedule(folder, draft.request, part)
    codec = partial(_tiled_codec, studio, draft.request)
    requests = [item.request for item in draft.items]

    def begun() -> tuple[Start, tuple[Tensor, ...]]:
        generators = tuple(torch.Generator("cpu").set_state(state) for state in draft.noise)
        drawn = draft.latents.to(device) * draft.schedule.final_scale if number else None
        start = begin_round(folder, codec, device, requests, part, schedule, generators, drawn).to("cpu")
        return start, tuple(generator.get_state() for generator in generators)

    try:
        start, noise = _with_room(begun, settle)
    except (MemoryError, RuntimeError, UsageError, RenderError) as error:
        if not isinstance(error, UsageError | RenderError) and not out_of_memory(error):
            raise
        free_memory(device)
        said = f"{device.type} ran out of memory encoding {part.width}×{part.height}; make it smaller." if out_of_memory(error) else str(error)
        return replace(draft.rows([]), round=number, lost=(*draft.lost, *(Lost(item, said) for item in draft.items)))
    fallbacks = tuple(dict.fromkeys((*draft.fallbacks, *start.fallbacks)))
    return replace(draft, round=number, stage=0, schedule=schedule, start=start, latents=start.latents, noise=noise, fallbacks=fallbacks)


def _tiled_codec(studio: Studio, request: Request) -> LatentCodec:
    return studio.codec().tiled(request.tile)


@torch.no_grad()
def advance(studio: Studio, draft: Draft, tell: Callable[[Stepped], None], settle: Settle = alone) -> Draft:
    """Do the next stage of a batch: all the steps of one expert.

    Out of memory, the rows are halved down to one, which is then lost; each half has the same noise as before.

    Raises:
        TuDiffuseError: the expert cannot be loaded.
    """
    try:
        return _with_room(partial(_advanced, studio, draft, tell), settle)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        part = draft.parts[draft.round]
        reason = f"{studio.place.device.type} ran out of memory at one picture of {part.width}×{part.height}; make it smaller."
    free_memory(studio.place.device)
    if len(draft.items) == 1:
        return replace(draft.rows([]), stage=draft.stage + 1, lost=(*draft.lost, Lost(draft.items[0], reason)))
    half = len(draft.items) // 2
    first, second = (advance(studio, draft.rows(cut), tell) for cut in (range(half), range(half, len(draft.items))))
    left = first.items + second.items
    return replace(
        first,
        items=left,
        said=first.said + second.said,
        start=draft.start.rows([row for row, item in enumerate(draft.items) if item in left]),
        latents=torch.cat([first.latents, second.latents]),
        noise=first.noise + second.noise,
        used=max(first.used, second.used, key=len),
        lost=(*draft.lost, *first.lost, *second.lost),
        fallbacks=tuple(dict.fromkeys((*first.fallbacks, *second.fallbacks, "batch-halved"))),
    )


def _advanced(studio: Studio, draft: Draft, tell: Callable[[Stepped], None]) -> Draft:
    request, schedule, device = draft.request, draft.schedule, studio.place.device
    start, part = draft.start.to(device), draft.parts[draft.round]
    experts = studio.table(schedule, request, part)
    first, end = stages(schedule.sigmas, experts.borders, part.first)[draft.stage]
    owner = experts.expert_for(float(schedule.sigmas[first]))
    told = [said[draft.round][owner.name] for said in draft.said]
    prompt = showing(on_device(stack_conditionings([said.prompt for said in told]), device), start, [item.request for item in draft.items], part)
    negative = on_device(stack_conditionings([said.negative for said in told]), device)
    scales = [owner.guidance if item.request.expert_guidance and owner.guidance is not None else item.request.guidance for item in draft.items]
    guidance = replace(guidance_policy(studio.folder, request), scale=torch.tensor(scales, dtype=torch.float64))
    generators = tuple(torch.Generator("cpu").set_state(state) for state in draft.noise)
    guided = partial(GuidedDenoiser(experts, guidance, negative), conditioning=prompt)
    steps = sampler_info(request.sampler).function(
        keeping(guided, start.kept, float(schedule.sigmas[part.first])),
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


def finish(studio: Studio, draft: Draft, settle: Settle = alone) -> Iterator[Drawn | Lost]:
    """Decode a batch whose stages are all done, one picture at a time; one that is not finite is lost, its neighbours are not.

    The codec is loaded by the call, which must therefore be where the rest is loaded; each picture is decoded when it is asked for, in any thread.
    """
    return _decoded(studio, draft, _tiled_codec(studio, draft.request), settle) if draft.items else iter(draft.lost)


@torch.no_grad()
def _decoded(studio: Studio, draft: Draft, codec: LatentCodec, settle: Settle) -> Iterator[Drawn | Lost]:
    yield from draft.lost
    part, device = draft.parts[-1], studio.place.device
    for row, item in enumerate(draft.items):
        latents = draft.latents[row : row + 1] * draft.schedule.final_scale
        try:
            decoded = _with_room(lambda latents=latents: codec.decode(latents.to(device)), settle)
        except RenderError as error:
            yield Lost(item, str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            free_memory(device)
            yield Lost(item, f"{device.type} ran out of memory decoding {part.width}×{part.height}; make it smaller.")
            continue
        truncated = words_lost(_overflow(draft.said[row]), strict=False)
        fallbacks = [*studio.fallbacks, *draft.fallbacks, *decoded.fallbacks[0]]
        settings = applied_settings(studio.folder, studio.place, item.request, item.seed, list(draft.used), truncated, fallbacks)
        pixels = composited(to_uint8(decoded.pixels)[0].cpu(), item.request.edit, part)
        yield Drawn(item, pixels, settings | {"item": item.key, "company": len(draft.items) - 1})


def _with_room(work: Callable[[], Result], settle: Settle) -> Result:
    """Do it; where memory runs out while something else computed beside it, once more when that is done."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # they hold tensors
        if not settle():
            raise
    return work()


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _overflow(said: Sequence[Mapping[str, Said]]) -> dict[str, str]:
    return {name: words for read in said for one in read.values() for name, words in one.overflow.items()}
