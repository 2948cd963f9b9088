"""Where experts live: loaded when their turn comes, prefetched shortly before, gone (or off the device) when they were left.

On the CPU an expert's weights come from the memory-mapped file. On CUDA they are parked in pinned memory and copied to the device on a stream of
their own, while the expert before them still computes.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention import AttentionBackend
from ..errors import UsageError
from ..model_files import read_json
from ..offload import offloaded
from ..seamless import wrapped
from ..weights import fill, without_storage
from .config import UNetConfig
from .deltas import Bases, chain, check_hashes, origin, read_expert
from .denoiser import Residuals, UNetDenoiser
from .experts import Expert, ExpertEntry, ExpertTable
from .layers import Recorder
from .lora import NOTHING, Added, adapted
from .unet import UNet

Keep = Literal["all", "active"]
Loader = Callable[[], UNetDenoiser]
Finish = Callable[[UNet, Mapping[str, Tensor]], UNet]
"""A network and the tensors of its files to the network to compute with, such as a quantized one."""


class ExpertPool:
    """Holds the experts of a model across runs.

    With keep "active", at most two are alive: the one that computes and the one being prefetched. With "all", every expert stays once it was loaded.
    Calls come from one thread. Each load happens on a thread of its own, which ends with it: one that stayed would keep its OpenMP threads, and
    while there are more of those than cores, libgomp lets the computing ones sleep at every barrier instead of spinning. One load at a time.
    """

    def __init__(
        self, entries: Sequence[ExpertEntry], loaders: Mapping[str, Loader], keep: Keep = "active", identities: Mapping[str, object] | None = None
    ) -> None:
        """Take the experts' loaders; nothing is loaded yet.

        Args:
            entries: names, intervals and guidance.
            loaders: for each name, what makes its denoiser, such as `load_expert` or `parked` with its arguments bound.
            keep: "active" or "all".
            identities: for each name its `Expert.identity`, see `identities`.
        """
        self.entries = tuple(entries)
        self.keep: Keep = keep
        self._identities = {} if identities is None else dict(identities)
        self._loaders = dict(loaders)
        self.loads: Counter[str] = Counter()  # how often each was loaded
        self._held: dict[str, Future[UNetDenoiser]] = {}
        self._adapted: dict[str, tuple[UNetDenoiser, Hashable, UNetDenoiser]] = {}  # the expert, what was added, the result
        self._active: str | None = None
        self._one_load = Lock()

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the experts that are in memory or on their way."""
        return tuple(self._held)

    def get(self, name: str) -> UNetDenoiser:
        """Give an expert, loading it or waiting for its prefetch where needed; with keep "active", lets go of the one before first.

        Raises:
            ModelError, UnsafeError: its files are not valid.
        """
        if name != self._active:
            self._active = name
            self._release_all_but(name)
        try:
            return self._begin(name).result()
        except BaseException:
            self._held.pop(name, None)
            raise

    def get_adapted(self, name: str, added: Added) -> UNetDenoiser:
        """Give an expert with LoRAs added: what they change is computed from its own weights, which stay as they are, and kept until others come.

        Raises:
            ModelError, UnsafeError: as `get`.
        """
        own = self.get(name)
        if not added.pairs:
            return own
        known = self._adapted.get(name)
        if known is None or known[0] is not own or known[1] != added.key:
            self._adapted.pop(name, None)
            known = self._adapted[name] = (own, added.key, own.with_unet(adapted(own.unet, added.pairs)))
        return known[2]

    def prefetch(self, name: str) -> None:
        """Begin to load an expert in the background, unless it is there or on its way. An error shows when the expert is asked for."""
        self._release_all_but(name, self._active)
        self._begin(name)

    def table(
        self,
        to_timestep: Callable[[Tensor], Tensor],
        recorder: Recorder | None = None,
        *,
        ahead: bool = True,
        added: Mapping[str, Added] | None = None,
        tile: str | None = None,
        residuals: Residuals | None = None,
    ) -> ExpertTable:
        """The experts as the `Denoiser` of one run.

        Args:
            to_timestep: what the networks are told at a sigma, see `UNetDenoiser`.
            recorder: see `UNetDenoiser`.
            ahead: prefetch the next expert when a run comes near its border; else it is the caller's to call `prefetch`.
            added: expert -> what LoRAs add to it; None for nothing.
            tile: "x", "y" or "xy", along which the run's pictures meet themselves; the experts of other runs do not.
            residuals: see `UNetDenoiser`.
        """
        changes = {} if added is None else added
        around: WeakKeyDictionary[UNet, UNet] = WeakKeyDictionary()  # of this run: network -> its twin that looks around the edge

        def load(name: str) -> UNetDenoiser:
            denoiser = replace(self.get_adapted(name, changes.get(name, NOTHING)), to_timestep=to_timestep, recorder=recorder, residuals=residuals)
            if tile is None:
                return denoiser
            if not isinstance(denoiser.unet, UNet):  # pyright: ignore[reportUnnecessaryIsInstance]  # the library's is passed off as ours
                raise UsageError("--tile needs U-Nets that our own network covers, and this model's are computed by diffusers; leave it out.")
            if denoiser.unet not in around:
                around[denoiser.unet] = wrapped(denoiser.unet, tile)
            return replace(denoiser, unet=around[denoiser.unet])

        def expert(entry: ExpertEntry) -> Expert:
            name, identity = entry.name, self._identities.get(entry.name)
            if identity is not None:
                identity = (identity, changes.get(name, NOTHING).key)
            prefetch = partial(self.prefetch, name) if ahead else _nothing
            return Expert(name, entry.sigma_min, entry.sigma_max, partial(load, name), entry.guidance, prefetch, identity)

        return ExpertTable([expert(entry) for entry in self.entries])

    def _begin(self, name: str) -> Future[UNetDenoiser]:
        if name not in self._held:
            self.loads[name] += 1
            thread = ThreadPoolExecutor(1, thread_name_prefix="expert")
            self._held[name] = thread.submit(self._load, name)
            thread.shutdown(wait=False)
        return self._held[name]

    def _load(self, name: str) -> UNetDenoiser:
        with self._one_load:
            return self._loaders[name]()

    def _release_all_but(self, *names: str | None) -> None:
        for other in [held for held in self._held if held not in names and self.keep == "active"]:
            self._held.pop(other).cancel()
            self._adapted.pop(other, None)


def _nothing() -> None:
    """The caller prefetches."""


def load_expert(
    folder: Path,
    prediction_type: str,
    to_timestep: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: AttentionBackend = AttentionBackend.AUTO,
    variant: str | None = None,
    sha256: str | None = None,
    bases: Bases | None = None,
    offload: bool = False,
    finish: Finish | None = None,
) -> UNetDenoiser:
    """Build one expert from its folder: `config.json` and safetensors weights, or a delta against another expert (see `deltas.py`).

    Weights stay memory-mapped where `dtype` is the stored one and the device is the CPU.

    Args:
        folder: such as `unet/`.
        prediction_type: see `UNetDenoiser`.
        to_timestep: see `UNetDenoiser`.
        dtype: of the weights and the network's computation.
        device: where it computes.
        backend: attention kernel.
        variant: see `load_weights`.
        sha256: what `deltas.expert_sha256` must give; None to skip that. The hashes of bases are always checked.
        bases: where the tensors of bases are kept once for several experts, of the same dtype; None shares nothing.
        offload: leave the weights where they are but while they compute, see `offload.offloaded`; the tensors of bases too.
        finish: what is done to the network once it has its weights; None for nothing.

    Raises:
        ModelError: a config that is not covered, weights that are not valid or not the ones that a hash names, or a base that is not there.
        UnsafeError: weights that are pickles.
    """
    folders, shared = chain(folder), Bases((), dtype, device, variant) if bases is None else bases
    config = UNetConfig.from_dict(read_json(folders[-1] / "config.json"))
    check_hashes(folders, sha256, shared.hash_of)
    state = read_expert(folder, variant)
    empty, tensors = without_storage(lambda: UNet(config, backend)), {name: stored.tensor for name, stored in state.items()}
    if offload:
        unet = offloaded(empty, tensors, folder, torch.device(device), dtype)
    else:
        unet = fill(empty, tensors, folder, lambda name, _: shared.place(name, state[name], device))
    if finish is not None:
        unet = finish(unet, tensors)
    return UNetDenoiser(unet, prediction_type, to_timestep)


def identities(folder: Path, entries: Sequence[ExpertEntry]) -> dict[str, object]:
    """What each expert computes with: recorded hash of its weights, guidance, and how it reads prompts; None where no hash is recorded.

    Args:
        folder: the model folder.
        entries: its experts.
    """
    hashes = {entry.name: origin(folder / entry.subfolder, entry.sha256)[1] for entry in entries}
    return {entry.name: None if hashes[entry.name] is None else (hashes[entry.name], entry.guidance, entry.text) for entry in entries}


def parked(load: Loader, device: torch.device | str) -> Loader:
    """Make a loader that keeps one copy of an expert in pinned CPU memory and gives a fresh copy on a CUDA device at each call.

    The copy runs on a stream of its own, so that it overlaps with what the device is computing when it is called from another thread.

    Args:
        load: makes the expert on the CPU, but for tensors that it shares with others; called once.
        device: a CUDA device.
    """
    stream = torch.cuda.Stream(device)

    @cache
    def host() -> UNetDenoiser:
        denoiser = load()
        for module in denoiser.unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_cuda:  # tensors of a base are on the device already, for all experts
                    setattr(module, name, nn.Parameter(parameter.pin_memory(), requires_grad=False))
        return denoiser

    def to_device() -> UNetDenoiser:
        master = host()
        memo: dict[int, Any] = {}
        with torch.cuda.stream(stream):
            for parameter in master.unet.parameters():
                if parameter.is_cuda:
                    memo[id(parameter)] = parameter
                    continue
                moved = parameter.to(device, non_blocking=True)
                # The memory belongs to this stream; the allocator must not hand it out again while the computing stream still reads it.
                moved.record_stream(torch.cuda.default_stream(device))
                memo[id(parameter)] = nn.Parameter(moved, requires_grad=False)
        stream.synchronize()
        return replace(master, unet=copy.deepcopy(master.unet, memo), _prompts=WeakKeyDictionary())

    return to_device


def expert_pool(
    folder: Path,
    entries: Sequence[ExpertEntry],
    prediction_type: str,
    to_timestep: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: AttentionBackend = AttentionBackend.AUTO,
    variant: str | None = None,
    keep: Keep = "active",
    finish: Finish | None = None,
    offload: bool = False,
) -> ExpertPool:
    """The pool for a model folder's experts: `load_expert` for each, parked in pinned memory on CUDA with keep "active".

    Tensors that an expert takes from its base are held once for all experts, on the device, as long as the pool lives.

    Args:
        folder: the model folder, above the experts' subfolders.
        entries: from `experts.read_experts`.
        prediction_type, to_timestep, dtype, device, backend, variant: see `load_expert`.
        keep: see `ExpertPool`.
        finish: see `load_expert`; with it nothing is parked.
        offload: see `load_expert`; nothing is parked, for all experts wait already.
    """
    parks = torch.device(device).type == "cuda" and keep == "active" and finish is None and not offload
    bases = Bases([base for entry in entries for base in chain(folder / entry.subfolder)[1:]], dtype, device, variant)
    loaders: dict[str, Loader] = {}
    for entry in entries:
        where, at = "cpu" if parks else device, folder / entry.subfolder
        load = partial(load_expert, at, prediction_type, to_timestep, dtype, where, backend, variant, entry.sha256, bases, offload, finish)
        loaders[entry.name] = parked(load, device) if parks else load
    return ExpertPool(entries, loaders, keep, identities(folder, entries))
