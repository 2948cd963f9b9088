"""Which weights of a model a LoRA changes: by the names that the layouts give to modules, and by shapes. Loads no weights; see docs/loras.md."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import ModelError
from ...single_file.names import ldm_names
from ...text_encoders.clip import CLIPText, CLIPTextConfig
from ...text_encoders.conditioner import Conditioner, ConditionerConfig
from ...text_encoders.t5 import T5Config, T5Encoder
from ...text_encoders.t5_residual import T5Residual, T5ResidualConfig
from ...unet.config import UNetConfig
from ...unet.experts import ExpertEntry
from ...unet.lora import LowRank
from ...unet.unet import UNet
from ...weights import without_storage
from ..model.folder import TEXT_PARTS, ModelFolder
from .lora_files import LoraFile, LoraKey

UNET = "unet"
TEXT_PREFIX = "text_model."  # of CLIP's modules, left out by transformers since 5.6

Fit = Mapping[LoraKey, tuple[str, str]]
"""Key of a LoRA file -> the network ("unet", or a component of the text side) and the module that its pair is added to."""


def match(folder: ModelFolder, file: LoraFile, expert: str | None = None) -> dict[str, Fit]:
    """Find what a LoRA changes, by the names and shapes of a model's weights; loads none.

    An expert that has a module of the same name in another shape is another network than the LoRA was trained for (SDXL's refiner for a LoRA of its
    base), and is left out.

    Args:
        folder: the model.
        file: the LoRA.
        expert: the only one to look at; None for all.

    Returns:
        Expert -> fit, for those that it fits; at least one.

    Raises:
        ModelError: no key fits, or all experts were left out; says what the first few keys are.
    """
    fits: dict[str, Fit] = {}
    misfits: list[str] = []
    for entry in folder.experts:
        if expert in (None, entry.name):
            fit, wrong = _fit(networks_of(folder, entry), file)
            misfits += wrong
            if fit and not wrong:
                fits[entry.name] = fit
    if fits:
        return fits
    if misfits:
        raise ModelError(
            f"{file.name} was trained for another model than {folder.name!r}: {len(misfits)} keys of it have another shape ({_first(misfits)})."
        )
    names = [key.module if key.part is None else f"{key.part} {key.module}" for key in file.pairs]
    raise ModelError(f"{file.name} fits no weight of {folder.name!r}: 0 of {len(names)} keys are known ({_first(names)}); name the model it is for.")


@dataclass(frozen=True, eq=False)
class Network:
    """Names and shapes of a network's weights.

    Attributes:
        name: "unet", or the component of the text side.
        parts: what LoRA files call it.
        shapes: module -> shape of its weight.
        aliases: what a LoRA may call a module -> module.
    """

    name: str
    parts: tuple[str, ...]
    shapes: Mapping[str, torch.Size]
    aliases: Mapping[str, str]


def networks_of(folder: ModelFolder, entry: ExpertEntry) -> list[Network]:
    """The networks that an expert uses: its U-Net, and what it reads prompts with."""
    unet = _shapes(_unet(folder, entry.subfolder))
    original = ldm_names(unet, folder.configs[entry.subfolder])
    networks = [Network(UNET, (UNET,), unet, _with_flat({name: name for name in unet} | original))]
    family = folder.family if entry.text is None else entry.text.family
    for part in TEXT_PARTS[family]:
        if not part.startswith("tokenizer"):
            name = part if entry.text is None else entry.text.parts[part]
            shapes = _shapes(_text(folder, name))
            # transformers' CLIP towers lost the level "text_model" in version 5.6, and with it the LoRAs that are trained with them.
            aliases = {alias: one for one in shapes for alias in (one, one.removeprefix(TEXT_PREFIX))}
            networks.append(Network(name, (part, "t5") if folder.parts[name] == "T5EncoderModel" else (part,), shapes, _with_flat(aliases)))
    return networks


def _fit(networks: Sequence[Network], file: LoraFile) -> tuple[Fit, list[str]]:
    fit: dict[LoraKey, tuple[str, str]] = {}
    misfits: list[str] = []
    for key, pair in file.pairs.items():
        named = [(one, one.aliases[key.module]) for one in networks if key.part in (None, *one.parts) and key.module in one.aliases]
        fitting = [(one.name, module) for one, module in named if _changes(pair, one.shapes[module])]
        if len(fitting) > 1:
            raise ModelError(f"{file.name} does not say which of {', '.join(name for name, _ in fitting)} its {key.module} is for; save it again.")
        if fitting:
            fit[key] = fitting[0]
        elif named:
            one, module = named[0]
            misfits.append(f"{module} {tuple(_product_shape(pair))} for {tuple(one.shapes[module])}")
    return fit, misfits


def _product_shape(pair: LowRank) -> torch.Size:
    return torch.Size((pair.up.shape[0], *pair.down.shape[1:]))


def _changes(pair: LowRank, shape: torch.Size) -> bool:
    """Whether a pair's product has a weight's shape; a 1×1 convolution is a linear layer, which some checkpoints have in its place."""
    return _without_ones(_product_shape(pair)) == _without_ones(shape)


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)


def _with_flat(aliases: Mapping[str, str]) -> dict[str, str]:
    return {**aliases, **{alias.replace(".", "_"): module for alias, module in aliases.items()}}


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name.removesuffix(".weight"): p.shape for name, p in network.named_parameters() if name.endswith(".weight") and p.ndim > 1}


def _unet(folder: ModelFolder, subfolder: str) -> nn.Module:
    config = folder.configs[subfolder]
    try:
        own = UNetConfig.from_dict(config)
    except ModelError:
        from ..model.library import empty_unet  # costs seconds of imports, so only where it is needed

        return empty_unet(config)
    return without_storage(lambda: UNet(own))


def _text(folder: ModelFolder, name: str) -> nn.Module:
    config = folder.configs[name]
    match folder.parts[name]:
        case "Conditioner":
            return without_storage(lambda: Conditioner(ConditionerConfig.from_dict(config)))
        case "T5Residual":
            return without_storage(lambda: T5Residual(T5ResidualConfig.from_dict(config)))
        case "T5EncoderModel":
            return without_storage(lambda: T5Encoder(T5Config.from_dict(config)))
        case kind:
            return without_storage(lambda: CLIPText(CLIPTextConfig.from_dict(config), projection=kind == "CLIPTextModelWithProjection"))


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(f"{name:.120}" for name in listed[:3]) + (", …" if len(listed) > 3 else "")
