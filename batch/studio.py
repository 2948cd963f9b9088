"""The parts of a model for a whole run: text encoders, experts and codec, each in memory only while it is needed where memory is short."""

import gc
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..contracts import Conditioning
from ..errors import UsageError
from ..pipeline.adapters.adapters import Adapters, LoraUse, Shelf
from ..pipeline.adapters.embeddings import EmbeddingUse
from ..pipeline.editing.control import ControlNets, network_bytes
from ..pipeline.model.describe import describe
from ..pipeline.model.folder import ModelFolder
from ..pipeline.model.loading import load_codec, load_experts
from ..pipeline.model.place import Place
from ..pipeline.model.readers import Encode, TextParts, load_texts, readers_of
from ..pipeline.request import Request, Round
from ..schedulers.schedules import SigmaSchedule
from ..text_encoders.prompts import Text
from ..unet.experts import ExpertTable
from ..unet.residency import ExpertPool
from ..vae.codec import LatentCodec

TEXTS_KEPT = 512  # encoded prompts that are remembered
WINDOW_SHARE = 4  # of the memory, that drafts may take where the model does not fit
_Key = tuple[Text, tuple[LoraUse, ...], tuple[EmbeddingUse, ...]]


def model_bytes(folder: ModelFolder, place: Place, requests: Iterable[Request] = ()) -> int:
    """What all parts of a model take in memory together, from their headers (offloaded: those that move in whole), with the networks that requests
    bring beside it."""
    beside = network_bytes([request.control for request in requests], place.dtype)
    facts = describe(folder)
    whole = sum(part["parameters"] for part in facts["parts"] if part["name"] in ("vae", "conditioner")) if place.offload else facts["parameters"]
    return whole * place.dtype.itemsize + beside


def memory_budget(gib: float | None, place: Place) -> int:
    """Bytes to stay within: as asked for, or four fifths of what is free on the device.

    Raises:
        UsageError: not above zero.
    """
    if gib is not None and not 0 < gib < math.inf:
        raise UsageError(f"--memory {gib:g} is out of range; give gibibytes above 0.")
    if gib is not None:
        return int(gib * 2**30)
    free = torch.cuda.mem_get_info(place.device)[0] if place.device.type == "cuda" else psutil.virtual_memory().available
    return free * 4 // 5


@dataclass(frozen=True, eq=False)
class Said:
    """A prompt and its negative as one expert reads them, one row each, on the CPU; and the words beyond the encoders' limits."""

    prompt: Conditioning
    negative: Conditioning
    overflow: Mapping[str, str]


class Studio:
    """The parts of a model, each loaded when it is asked for.

    With `roomy`, every part stays once it was loaded. Without, text encoders, experts and codec take turns: asking for one lets the others go.
    """

    def __init__(self, folder: ModelFolder, place: Place, *, roomy: bool, files: Mapping[str, Path] | None = None) -> None:
        """Hold nothing yet.

        Args:
            folder: the model.
            place: where it computes.
            roomy: see above.
            files: hash -> path of the LoRAs and embeddings that requests name.
        """
        self.folder = folder
        self._shelf = Shelf(folder, files)
        self.place = place
        self.roomy = roomy
        self.fallbacks: tuple[str, ...] = ()  # parts that the library's classes compute
        self._loads: Counter[str] = Counter()
        self._encoders: Mapping[str, TextParts] | None = None
        self._readers: tuple[Adapters, Mapping[str, Encode]] | None = None  # of the LoRAs that came last
        self._experts: ExpertPool | None = None
        self._codec: LatentCodec | None = None
        self._controls = ControlNets(place.device, place.dtype)
        self._texts: OrderedDict[_Key, Mapping[str, Said]] = OrderedDict()

    def read(self, request: Request, part: Round) -> Mapping[str, Said]:
        """What each expert is told of a request in one of its rounds; a text that was read before is remembered."""
        key = (request.text(part), request.loras, request.embeddings)
        if key not in self._texts:
            self._texts[key] = _read(self._text_readers(self._shelf.adapters(request.loras, request.embeddings)), request.text(part))
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def experts(self) -> ExpertPool:
        """The experts; with `roomy` all of them stay, else the one that computes and the one that is prefetched."""
        if self._experts is None:
            self._make_room()
            self._experts, fallbacks = load_experts(self.folder, self.place, keep="all" if self.roomy else "active")
            self._note(fallbacks)
        return self._experts

    def table(self, schedule: SigmaSchedule, request: Request, part: Round) -> ExpertTable:
        """The experts as the denoiser of a round, as the request changes them."""
        experts, added = self.experts(), self._shelf.adapters(request.loras).unets
        residuals = self._controls.residuals(request.control, schedule, part.first)
        return experts.table(schedule.timestep_at, ahead=self.roomy, added=added, tile=request.tile, residuals=residuals)

    def codec(self) -> LatentCodec:
        """The codec."""
        if self._codec is None:
            self._make_room()
            self._codec, fallbacks = load_codec(self.folder, self.place)
            self._loads["codec"] += 1
            self._note(fallbacks)
        return self._codec

    @property
    def decodes_beside(self) -> bool:
        """Whether pictures are decoded while the next batch is drawn, which needs all parts in memory: with CUDA, and on a CPU with cores to spare.

        Both compute with as many threads, and on the same cores they are slower than one after the other (docs/batch.md). MPS takes work from one
        thread at a time.
        """
        cores = psutil.cpu_count(logical=False) or 1
        spare = {"cuda": True, "cpu": 2 * torch.get_num_threads() <= cores}.get(self.place.device.type, False)
        return self.roomy and spare and not self.place.offload

    @property
    def loads(self) -> dict[str, int]:
        """How often each part was loaded."""
        now = Counter() if self._experts is None else self._experts.loads
        return dict(self._loads + now + Counter({"ControlNet": self._controls.loads}))

    def _text_readers(self, adapters: Adapters) -> Mapping[str, Encode]:
        if self._encoders is None:
            self._make_room()
            self._encoders = load_texts(self.folder, self.place)
            self._loads["text encoders"] += 1
        if self._readers is None or self._readers[0] is not adapters:
            self._readers = None  # before the next copies are made
            self._readers = (adapters, readers_of(self.folder, self._encoders, adapters))
        return self._readers[1]

    def _note(self, fallbacks: tuple[str, ...]) -> None:
        self.fallbacks = tuple(dict.fromkeys((*self.fallbacks, *fallbacks)))

    def _make_room(self) -> None:
        if not self.roomy:
            self._loads += Counter() if self._experts is None else self._experts.loads
            self._loads["ControlNet"] += self._controls.loads
            self._encoders = self._readers = self._experts = self._codec = None
            self._controls = ControlNets(self.place.device, self.place.dtype)
            gc.collect()


def _read(readers: Mapping[str, Encode], text: Text) -> dict[str, Said]:
    known: dict[Encode, Said] = {}
    for encode in dict.fromkeys(readers.values()):
        prompt, negative = encode(text)
        overflow = prompt.overflow[0] | {f"negative {name}": words for name, words in negative.overflow[0].items()}
        known[encode] = Said(on_device(prompt.conditioning, "cpu"), on_device(negative.conditioning, "cpu"), overflow)
    return {name: known[encode] for name, encode in readers.items()}


def on_device(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    """A conditioning on another device."""
    rest = (conditioning.mask, conditioning.pooled, conditioning.size_ids, conditioning.shown, conditioning.hint)
    return Conditioning(conditioning.tokens.to(device), *(None if part is None else part.to(device) for part in rest))
