"""What comparisons with diffusers' own pipelines have in common: a model loaded by both, and the latents that ours decodes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import text_to_image
from tu_diffuse.vae.codec import LatentCodec

TOLERANCE = 1e-4
PROMPT = "a red apple"


@cache
def ours(folder: Path) -> Model:
    return load_model(open_folder(folder), dtype="float32", device="cpu")


@cache
def theirs(folder: Path, kind: str = "DiffusionPipeline") -> Any:
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Listening(LatentCodec):
    """A codec that remembers the latents it was given to decode."""

    def __init__(self, codec: LatentCodec, heard: list[Tensor]) -> None:
        self.__dict__.update(codec.__dict__)
        self.heard = heard

    def decode(self, latents: Tensor) -> Any:
        self.heard.append(latents)
        return super().decode(latents)


def latents(folder: Path, **asked: Any) -> Tensor:
    """The finished latents of a request for `PROMPT`."""
    model, heard = ours(folder), list[Tensor]()
    list(text_to_image(replace(model, codec=Listening(model.codec, heard)), resolve(model.folder, PROMPT, **asked)))
    return torch.cat(heard)
