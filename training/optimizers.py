"""Optimizers by name, and their state as named tensors and JSON numbers, so that a checkpoint holds no pickle."""

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .train_config import OptimizerName, TrainConfig

_LIBRARIES = {"adamw8bit": "bitsandbytes", "lion": "pytorch_optimizer", "prodigy": "pytorch_optimizer"}
_GROUP = "group/"  # before the names of the parameter group's own values

Numbers = dict[str, float | int | bool]


def check_optimizer(name: OptimizerName) -> None:
    """Check that the library of an optimizer is installed.

    Raises:
        UsageError: it is not.
    """
    library = _LIBRARIES.get(name)
    if library is not None and find_spec(library) is None:
        raise UsageError(f"--optimizer {name} needs {library}, which is not installed; pip install 'tu-diffuse[optimizers]', or use adamw.")


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names.

    adamw (Loshchilov & Hutter 2019) and adafactor (Shazeer & Stern 2018; `lr` is relative to the size of each weight) are PyTorch's; adamw8bit
    (Dettmers et al. 2022, moments in 8 bits) is bitsandbytes'; lion (Chen et al. 2023) and prodigy (Mishchenko & Defazio 2023; finds the rate
    itself, `lr` multiplies it) are pytorch-optimizer's.

    Raises:
        UsageError: its library is not installed.
    """
    check_optimizer(config.optimizer)
    parameters, lr, decay = list(parameters), config.lr, config.weight_decay
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=lr, weight_decay=decay)
        case "adamw8bit":
            from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]

            return AdamW8bit(parameters, lr=lr, betas=config.betas, weight_decay=decay)
        case "lion":
            from pytorch_optimizer import Lion  # pyright: ignore[reportMissingImports]

            return Lion(parameters, lr=lr, weight_decay=decay)
        case "prodigy":
            from pytorch_optimizer import Prodigy  # pyright: ignore[reportMissingImports]

            return Prodigy(parameters, lr=lr, weight_decay=decay)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> tuple[dict[str, Tensor], Numbers]:
    """All that an optimizer knows of its parameters, which have `names` in its order: tensors as "<name>.<key>", and what is no tensor."""
    state, tensors, numbers = optimizer.state_dict(), dict[str, Tensor](), Numbers()
    found = [(f"{name}.", state["state"].get(index, {})) for index, name in enumerate(names)]
    for prefix, values in [*found, (_GROUP, state["param_groups"][0])]:
        for key, value in _flat(values):
            if isinstance(value, Tensor):
                tensors[prefix + key] = value
            elif isinstance(value, int | float) and math.isfinite(value):
                numbers[prefix + key] = value
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Give a new optimizer the state that `optimizer_state` read from another."""
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    group: dict[str, Any] = optimizer.state_dict()["param_groups"][0]
    for full, value in {**tensors, **numbers}.items():
        if full.startswith(_GROUP):
            group[full.removeprefix(_GROUP)] = value
            continue
        name, _, key = full.rpartition(".")
        *inside, last = key.split("/")
        place = state.setdefault(index_of[name], {})
        for part in inside:
            place = place.setdefault(part, {})
        place[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": [group]})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Values in nested mappings, keys joined by slashes."""
    nested = [_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)] for key, value in values.items()]
    return [item for items in nested for item in items]
