"""Low-rank weights (LoRA: Hu et al. 2021, arXiv 2106.09685), read from a file in diffusers' layout and added to the weights of a U-Net."""

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..model_files import read_safetensors
from ..offload import changed

METADATA = "lora_adapter_metadata"  # header entry in which diffusers keeps peft's settings, as JSON with names that begin with "unet."
_KEY = re.compile(r"unet\.(?P<module>[A-Za-z0-9_.]+?)\.(?P<kind>lora\.down\.weight|lora\.up\.weight|lora_A\.weight|lora_B\.weight|alpha)")
_KINDS = {"lora.down.weight": "down", "lora_A.weight": "down", "lora.up.weight": "up", "lora_B.weight": "up", "alpha": "alpha"}
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "alpha_pattern")


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one weight: scale · up · down.

    Attributes:
        down: (rank, in), or (rank, in, kh, kw) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        scale: alpha / rank; 1 where the file names no alpha.
    """

    down: Tensor
    up: Tensor
    scale: float


Pairs = Mapping[str, Sequence[LowRank]]
"""Module name -> what is added to its weight, one after the other."""

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Added:
    """What LoRAs add to one network.

    Attributes:
        key: equal where the pairs are equal.
        pairs: nothing where no LoRA concerns the network.
    """

    key: Hashable
    pairs: Pairs


NOTHING = Added((), {})


def with_pairs(weight: Tensor, pairs: Sequence[LowRank]) -> Tensor:
    """A weight with pairs added, in float32, so that a small change of half-precision weights is not rounded away on the way."""
    changed = weight.float()
    for pair in pairs:
        up, down = (part.to(weight.device).float().flatten(1) for part in (pair.up, pair.down))
        changed = changed + pair.scale * (up @ down).view(weight.shape)
    return changed


def adapted(network: N, pairs: Pairs) -> N:
    """A copy of a network with pairs added to its weights. What they leave alone is shared with the original, which stays bit for bit what it is.

    Args:
        network: any, with `{module}.weight` for every module that the pairs name, of their shape.
        pairs: what to add.

    Raises:
        UsageError: as `offload.changed`.
    """

    def add(weight: Tensor, own: Sequence[LowRank]) -> Tensor:
        return with_pairs(weight, own).to(weight)

    return changed(network, {f"{module}.weight": partial(add, own=own) for module, own in pairs.items()})


def read_lora(path: Path) -> dict[str, LowRank]:
    """Read a `pytorch_lora_weights.safetensors`: module name -> what is added to its weight.

    Names are `unet.<module>.lora.down.weight` and `.lora.up.weight` (or peft's `lora_A`, `lora_B`), with an optional scalar `unet.<module>.alpha`.
    Without that, alpha is what the header's settings say, else the rank.

    Raises:
        ModelError: not a safetensors file, another tensor in it, half a pair, shapes that do not fit, or a kind of LoRA that is not covered.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(path).items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ModelError(f"{path} holds a tensor {name!r:.200}; an expert's LoRA may hold unet.<module>.lora.down.weight and .up.weight only.")
        found.setdefault(match["module"], {})[_KINDS[match["kind"]]] = tensor
    common = _common_alpha(path)
    pairs: dict[str, LowRank] = {}
    for module, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise ModelError(f"{path} holds only {', '.join(sorted(parts))} for {module}; both down and up were wanted, save it again.")
        down, up = parts["down"], parts["up"]
        if down.ndim < 2 or up.ndim < 2 or not down.shape[0] == up.flatten(1).shape[1] >= 1:
            raise ModelError(f"{path} holds down {tuple(down.shape)} and up {tuple(up.shape)} for {module}, which make no product; save it again.")
        alpha = common if "alpha" not in parts else float(parts["alpha"]) if parts["alpha"].numel() == 1 else math.nan
        if alpha is not None and not math.isfinite(alpha):
            raise ModelError(f"{path} holds an alpha for {module} that is not one finite number; save it again.")
        pairs[module] = LowRank(down, up, 1.0 if alpha is None else alpha / down.shape[0])
    return pairs


def with_lora(state: Mapping[str, Tensor], pairs: Mapping[str, LowRank], path: Path) -> dict[str, Tensor]:
    """The weights that the pairs change, with the pairs added; float32, so that a small change of half-precision weights is not rounded away.

    Args:
        state: the U-Net's tensors.
        pairs: from `read_lora`.
        path: their file, for messages.

    Returns:
        Tensor name -> new tensor, for the changed ones only.

    Raises:
        ModelError: a module that the U-Net does not have, or of another shape.
    """
    changed: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if name not in state:
            raise ModelError(f"{path} changes {module}, which the U-Net does not have; it was trained for another model.")
        weight = state[name].float()
        if (pair.up.shape[0], *pair.down.shape[1:]) != tuple(weight.shape):
            raise ModelError(
                f"{path} changes {module} by up {tuple(pair.up.shape)} · down {tuple(pair.down.shape)}, but its weight is {tuple(weight.shape)}; "
                f"it was trained for another model."
            )
        changed[name] = with_pairs(weight, [pair])
    return changed


def _common_alpha(path: Path) -> float | None:
    """The alpha in the header's settings, when they are there."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        text = None if header is None else header.get(METADATA)
        settings: dict[str, Any] = {} if text is None else json.loads(text)
        settings = {name.removeprefix("unet."): value for name, value in settings.items()}
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a header whose {METADATA} cannot be read ({error}); save it again.") from error
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ModelError(f"{path} is a LoRA with {name} = {settings[name]!r:.200}, which is not covered; merge it with the program that made it.")
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{path} has lora_alpha = {alpha!r:.200} in its header; a finite number was wanted, save it again.")
    return float(alpha)
