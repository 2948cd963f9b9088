"""What a fine-tuning run leaves: a model folder, and LoRA files."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipeline.model.folder import ModelFolder
from ..unet.deltas import read_expert
from .config import FinetuneConfig
from .expert_files import Draft, Kept, weights_for, write_model
from .lora import Pairs, pairs_of, with_pairs, write_diffusers, write_kohya

LORA_FILE = "pytorch_lora_weights.safetensors"


def alpha_of(config: FinetuneConfig) -> float:
    """The scale of the adapters times their rank."""
    return float(config.lora or 0) if config.lora_alpha is None else config.lora_alpha


def write_result(config: FinetuneConfig, folder: ModelFolder, weights: Mapping[str, Tensor], target: Path) -> None:
    """Write the model folder `target` with the trained weights; with LoRA they are added to the model's own.

    Args:
        config: of the run.
        folder: the model that was trained.
        weights: all tensors of the networks as `subject.trained_networks` names them, those of adapters included.
        target: the new folder.
    """
    states = {name: _own(config, weights, name, own) for name, own in _pairs(weights).items()}
    drafts: list[Draft] = []
    for entry in folder.experts:
        own = folder.path / entry.subfolder
        state = states.get(f"unets.{entry.name}")
        if state is None or "unet" not in config.train.split(","):
            drafts.append(Draft(entry, Kept(own)))
        else:
            dtype = next(stored.tensor.dtype for stored in read_expert(own).values())
            drafts.append(Draft(entry, weights_for(own, {name: tensor.detach().cpu().to(dtype) for name, tensor in state.items()})))
    texts = {name.removeprefix("text."): state for name, state in states.items() if name.startswith("text.")}
    write_model(folder, drafts, target, replaced=texts, scheduler=folder.configs["scheduler"] if config.zero_terminal_snr else None)


def lora_files(config: FinetuneConfig, folder: ModelFolder, weights: Mapping[str, Tensor]) -> dict[str, Callable[[Path], None]]:
    """The LoRA files of a run, by name, with what writes each: one, or in an ensemble one for each expert and one for each text encoder.

    Args:
        config: of the run; none without LoRA.
        folder: the model that was trained.
        weights: as for `write_result`.
    """
    if config.lora is None:
        return {}
    contents = _by_file(folder, {name: own for name, own in _pairs(weights).items() if own})
    alpha = alpha_of(config)
    if config.format == "kohya":
        family, unet = _shape(folder, config.expert)
        return {name: partial(write_kohya, pairs=own, alpha=alpha, family=family, unet=unet) for name, own in contents.items()}
    return {name: partial(write_diffusers, pairs=own, rank=config.lora, alpha=alpha) for name, own in contents.items()}


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Each network's pairs."""
    return {name: pairs_of(weights, name) for name in dict.fromkeys(".".join(name.split(".")[:2]) for name in weights)}


def _own(config: FinetuneConfig, weights: Mapping[str, Tensor], network: str, pairs: Pairs) -> dict[str, Tensor]:
    prefix = f"{network}."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return state if config.lora is None else with_pairs(state, pairs, alpha_of(config) / config.lora)


def _by_file(folder: ModelFolder, pairs: Mapping[str, Pairs]) -> dict[str, dict[str, Pairs]]:
    """File name -> component -> pairs. One file of everything is what diffusers loads; of an ensemble each network has its own."""
    named = {name: (kind, rest) for name in pairs for kind, _, rest in [name.partition(".")]}
    content = {name: ("unet" if kind == "unets" else rest, pairs[name]) for name, (kind, rest) in named.items()}
    if len(folder.experts) == 1:
        return {LORA_FILE: dict(content.values())}
    return {f"{rest}-{LORA_FILE}": dict([content[name]]) for name, (_, rest) in named.items()}


def _shape(folder: ModelFolder, expert: str | None) -> tuple[str, Mapping[str, Any]]:
    """Family and U-Net's config of what was trained, which decide kohya's names."""
    entry = next(entry for entry in folder.experts if expert in (None, entry.name))
    family = folder.family if entry.text is None else entry.text.family
    return family, folder.configs[entry.subfolder]
