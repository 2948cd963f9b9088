"""Weights of a model folder into a module, each tensor checked before it is used, memory-mapped where nothing has to be converted.

Build the module without storage (`without_storage(lambda: UNet(config))`) and hand it to `load_weights`. The meta device also catches
buffers: a module whose buffers are not in its files makes them in `forward`, or names their device (`torch.arange(n, device="cpu")`), which wins
over it. A tensor that is still without storage after loading is an error here, not garbage later.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ModelError
from .model_files import listed, read_weights

M = TypeVar("M", bound=nn.Module)


def load_weights(
    module: M,
    folder: Path,
    stem: str = "diffusion_pytorch_model",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> M:
    """Fill a module (usually on the meta device) with the weights of a model folder.

    On the CPU, tensors that are stored in `dtype` stay backed by the memory-mapped file, which is read once for the check for NaN and
    can be dropped from memory again.

    Args:
        module: takes the weights; its parameter names and shapes must match the file's exactly.
        folder: holds `{stem}.safetensors` or a sharded `{stem}.safetensors.index.json`.
        stem: file name without its ending; transformers' folders use "model".
        dtype: of floating-point tensors; as stored when None. Integer tensors keep theirs.
        device: where the tensors go.
        variant: see `model_files.weight_files`.
        convert: turns the file's names and shapes into the module's, for files of another make.

    Returns:
        `module` itself, in eval mode, no parameter asking for a gradient.

    Raises:
        UnsafeError: the folder holds pickle files only.
        ModelError: missing, damaged, incomplete or mismatched weights, or NaN or infinity in them.
    """
    state = read_weights(folder, stem, variant)
    if convert is not None:
        state = convert(state)
    return fill(module, state, folder, lambda name, tensor: placed(name, tensor, folder, dtype, device)).to(device)


def fill(module: M, state: Mapping[str, Tensor], folder: Path, place: Callable[[str, Tensor], Tensor]) -> M:
    """Give a module the tensors of a state, each as `place(name, tensor)` returns it; see `load_weights`.

    Raises:
        ModelError: names, shapes or kinds do not match, or a tensor is left without storage; names `folder`.
    """
    check_match(module.state_dict(), state, folder)
    module.load_state_dict({name: place(name, tensor) for name, tensor in state.items()}, strict=True, assign=True)
    empty = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(f"{type(module).__name__} has tensors that no file holds, built without storage: {listed(empty)}; name their device.")
    return module.requires_grad_(False).eval()


def placed(name: str, tensor: Tensor, folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """A stored tensor on its device, in `dtype` when it is floating point; itself where nothing changes.

    Raises:
        ModelError: it holds NaN or infinity; names `folder`.
    """
    if not tensor.is_floating_point():
        return tensor.to(device=device)
    check_finite(name, tensor, folder)
    return tensor.to(device=device, dtype=dtype)


def without_storage(make: Callable[[], M]) -> M:
    """Build a module on the meta device, for `load_weights` to fill."""
    with torch.device("meta"), _NoInitialisation():
        return make()


class _NoInitialisation(TorchFunctionMode):
    """Skips the drawing of initial weights: on the meta device it is lost work, and makes torch import its compiler (over a second)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        named = {} if kwargs is None else kwargs
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def check_match(wanted: Mapping[str, Tensor], came: Mapping[str, Tensor], folder: Path) -> None:
    """Check that weights have the names, shapes and kinds that a module has.

    Raises:
        ModelError: they do not; names `folder` and the first few of each complaint.
    """
    missing, extra = sorted(wanted.keys() - came.keys()), sorted(came.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(came[name].shape)} for {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & came.keys())
        if came[name].shape != wanted[name].shape
    ]
    types = [
        f"{name} {came[name].dtype} for {wanted[name].dtype}"
        for name in sorted(wanted.keys() & came.keys())
        if came[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    complaints = [("missing", missing), ("unexpected", extra), ("of another shape", shapes), ("of another kind", types)]
    said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in complaints if names)
    if said:
        raise ModelError(f"The weights in {folder} do not fit the config ({said}); the folder mixes two models, or its config.json is wrong.")


def check_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Check that a tensor holds no NaN and no infinity: one pass over its memory.

    Raises:
        ModelError: it does; names it and `folder`.
    """
    # Extremes carry NaN and infinity along without a second copy of the tensor; float8 has no such kernel.
    values = tensor.detach().to(torch.float32) if tensor.element_size() == 1 else tensor.detach()
    if tensor.numel() > 0 and not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values)):
        raise ModelError(f"{name} in {folder} holds NaN or infinity; what wrote it went wrong, take another checkpoint.")
