"""Weights that wait where they are stored and move in for as long as a module computes, by accelerate's hooks: `--offload`.

On the CPU they wait in their files, mapped and in the files' number format; on other devices in main memory. What a module computes with is bit for
bit what it would have held all along. Memory is needed for the largest module instead of for all of them.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .allocator import give_back_freed_memory
from .errors import UsageError
from .weights import check_finite, check_match

Change = Callable[[Tensor], Tensor]
"""A weight to what takes its place; of a tensor without storage, one without storage of the new shape."""

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Waiting(Mapping[str, Tensor]):
    """The weights of a network by their names, each made ready when it is asked for.

    Attributes:
        stored: as they wait.
        device: where the network computes.
        dtype: of floating-point tensors there.
        changes: what is done to some of them there, in this order.
        finish: what is done to each then, such as quantizing it; None for nothing.
    """

    stored: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict[str, tuple[Change, ...]])
    finish: Change | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the network computes with it."""
        stored = self.stored[name]
        tensor = stored.to(device=self.device, dtype=self.dtype if stored.is_floating_point() else None)
        for change in self.changes.get(name, ()):
            tensor = change(tensor)
        return tensor if self.finish is None else self.finish(tensor)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.stored)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Waiting":
        """Itself: a copy of a network has the same weights."""
        return self

    def changed(self, changes: Mapping[str, Change]) -> "Waiting":
        """The same with more changes."""
        return replace(self, changes={**self.changes, **{name: (*self.changes.get(name, ()), change) for name, change in changes.items()}})


def offloaded(network: N, stored: Mapping[str, Tensor], folder: Path, device: torch.device, dtype: torch.dtype, *, whole: bool = False) -> N:
    """The network itself, on the meta device but while it computes.

    Args:
        network: without storage and without buffers.
        stored: all its weights, on the CPU.
        folder: where they are from.
        device: where it computes.
        dtype: of its floating-point weights there.
        whole: all its weights move in together, when it is called or `present`; else those of each module that holds some, when that is called.

    Raises:
        ModelError: names, shapes or kinds do not match, or a tensor holds NaN or infinity; names `folder`.
    """
    from accelerate.hooks import attach_align_device_hook

    give_back_freed_memory()
    check_match(network.state_dict(), stored, folder)
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            check_finite(name, tensor, folder)
    kept = stored if device.type == "cpu" else {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    waiting = Waiting(kept, device, dtype)
    units = [type(network).__name__] if whole else None
    name: Any = str(device)  # a torch.device would make it empty the cache of some accelerator for every tensor on the CPU
    attach_align_device_hook(network.to(dtype), name, offload=True, weights_map=waiting, preload_module_classes=units)
    vars(network)["waiting"] = waiting
    return network.requires_grad_(False).eval()


def waiting_of(network: nn.Module) -> Waiting | None:
    """The weights of an offloaded network; None of any other."""
    return vars(network).get("waiting")


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes."""
    waiting = waiting_of(network)
    return next(network.parameters()).device if waiting is None else waiting.device


def remember(network: nn.Module, originals: Waiting) -> None:
    """Note what the weights of a network that is about to be quantized are made of, for `changed`."""
    vars(network)["originals"] = originals


def changed(network: N, changes: Mapping[str, Change]) -> N:
    """A copy of a network with some weights changed. The others are shared with the original, which stays bit for bit what it is.

    Args:
        network: any. What is changed of an offloaded one is made anew each time it moves in; of a quantized one the weights that it was made of are
            changed, and quantized then.
        changes: name of a parameter -> what is done to it.

    Raises:
        UsageError: a weight is quantized, and nothing is known of what it was made of.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    waiting, originals = (known.changed(changes) if known is not None else None for known in (waiting_of(network), vars(network).get("originals")))
    memo |= {id(vars(network)[name]): new for name, new in (("waiting", waiting), ("originals", originals)) if new is not None}
    for name, change in changes.items():
        weight = network.get_parameter(name)
        if not is_traceable_wrapper_subclass(weight):
            new = change(weight.detach())
        elif originals is not None:
            new = originals[name]
        else:
            raise UsageError("LoRAs cannot be added to the quantized weights of a network that diffusers computes; leave out --quantize.")
        memo[id(weight)] = nn.Parameter(new, requires_grad=False)
    return copy.deepcopy(network, memo)


@contextmanager
def present(network: nn.Module) -> Generator[None]:
    """Hold the weights of a network that is offloaded as a whole, for what uses it other than by calling it; of any other they are there anyway."""
    hook = None if waiting_of(network) is None else vars(network)["_hf_hook"]
    if hook is None:
        yield
        return
    hook.pre_forward(network)
    try:
        yield
    finally:
        hook.post_forward(network, None)
