"""What is trained: the experts of a model folder, in float32, and the text encoders with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..contracts import Conditioning
from ..errors import UsageError
from ..pipeline.model.folder import ModelFolder
from ..unet.config import UNetConfig
from ..unet.deltas import read_expert
from ..unet.experts import ExpertEntry, ExpertText
from ..unet.unet import UNet
from .config import FinetuneConfig
from .expert_files import verified
from .lora import add_adapters
from .objective import Draw, Predict
from .result import alpha_of
from .turns import owned_timesteps


@dataclass(frozen=True, eq=False)
class Subject:
    """A model being trained.

    Attributes:
        folder: what it was loaded from.
        unets: expert's name -> its U-Net, trainable, float32.
        owned: expert's name -> the timesteps [first, end) that it is asked for.
        device: where they are.
    """

    folder: ModelFolder
    unets: nn.ModuleDict
    owned: dict[str, tuple[int, int]]
    device: torch.device


def load_subject(folder: ModelFolder, expert: str | None, device: torch.device) -> Subject:
    """Load a model to train all its experts, or one.

    Raises:
        UsageError: there is no expert of that name, or it has a dot in it, which PyTorch's modules do not take.
        ModelError: weights that are missing, damaged, not those that were recorded, or do not fit.
    """
    owned = owned_timesteps(folder, expert)
    entries = [entry for entry in folder.experts if entry.name in owned]
    for entry in entries:
        if "." in entry.name:
            raise UsageError(f"the expert {entry.name!r} has a dot in its name, which cannot be trained under it; rename it in experts.json.")
    verified(folder)
    unets = nn.ModuleDict({entry.name: _trainable(folder, entry) for entry in entries}).to(device)
    return Subject(folder, unets, owned, device)


def trained_networks(subject: Subject, readers: Mapping[str, nn.Module], config: FinetuneConfig) -> nn.ModuleDict:
    """The networks of a run as one module: `unets.<expert>`, and `text.<component>` for trained ones. Puts adapters in and freezes the rest.

    Args:
        subject: the experts.
        readers: `Source.networks`.
        config: says what is trained, and how.

    Raises:
        UsageError: a part is to be trained that the samples do not go through.
    """
    parts = config.train.split(",")
    texts = {name: network for name, network in readers.items() if ("conditioner" if name == "conditioner" else "text-encoders") in parts}
    if "text-encoders" in parts and "text_encoder" not in readers and "text_encoder_2" not in readers:
        raise UsageError("--train text-encoders needs captions, and these shards hold what the encoders said already; give the shards of pictures.")
    adapted = [*(subject.unets.values() if "unet" in parts else ()), *texts.values()]
    subject.unets.requires_grad_("unet" in parts)
    if config.lora is not None:
        add_adapters(adapted, config.lora, alpha_of(config), config.seed)
    else:
        for network in texts.values():
            for parameter in network.parameters():
                parameter.data = parameter.data.clone()  # loaded weights are the file's memory
                parameter.requires_grad_()
    return nn.ModuleDict({"unets": subject.unets, "text": nn.ModuleDict(texts)})


def read_as(folder: ModelFolder, expert: str | None) -> tuple[ModelFolder, ExpertText | None]:
    """How the experts of a run read prompts: the folder with their family, and their components where these are not the folder's (for `load_text`).

    Args:
        folder: the model.
        expert: the one that is trained, or None for all.

    Raises:
        UsageError: all are trained, and they do not read alike.
    """
    texts = [entry.text for entry in folder.experts if expert in (None, entry.name)]
    if any(text != texts[0] for text in texts):
        names = ", ".join(entry.name for entry in folder.experts)
        raise UsageError(f"The experts of {folder.name!r} read prompts in different ways; train one at a time, with --expert and one of {names}.")
    text = texts[0] if texts else None  # an expert that is not there is refused where it is loaded
    return (folder, None) if text is None else (replace(folder, family=text.family, zero_negative=text.zero_negative), text)


def _trainable(folder: ModelFolder, entry: ExpertEntry) -> UNet:
    unet = UNet(UNetConfig.from_dict(folder.configs[entry.subfolder]))
    state = read_expert(folder.path / entry.subfolder)
    unet.load_state_dict({name: stored.tensor.float() for name, stored in state.items()})
    return unet.train()


def predictor(subject: Subject, expert: str, conditioning_of: Callable[[Draw], Conditioning]) -> Predict:
    """Bind captions to one expert.

    Args:
        subject: the experts.
        expert: the one that owns all the timesteps that it will be given.
        conditioning_of: the captions' conditioning.
    """
    unet = subject.unets[expert]
    assert isinstance(unet, UNet)
    takes_pooled = unet.class_embedding is not None or unet.add_embedding is not None

    def predict(x: Tensor, t: Tensor, drawn: Draw) -> Tensor:
        said = conditioning_of(drawn)
        pooled, size_ids = said.pooled if takes_pooled else None, said.size_ids if unet.add_embedding is not None else None
        return unet(x, t, unet.text_keys_values(said.tokens), said.mask, pooled, size_ids)

    return predict
