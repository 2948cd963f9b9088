"""Where the samples of a run come from: one contract, `Source`, and its implementation for pictures and captions.

`encoded.py` has the other implementation, for shards of latents and text features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..contracts import Conditioning
from ..pipeline.model.folder import ModelFolder
from ..pipeline.model.readers import AESTHETIC_SCORE, TextParts
from ..shards.index import ShardIndex
from ..text_encoders.conditioner import Conditioner
from ..text_encoders.encode import embed_clip_t5, embed_t5, encode_sd, encode_sdxl, encode_t5
from ..text_encoders.parts import ClipPart, ClipT5Part, SdT5Part, SdxlT5Part, T5Part
from ..text_encoders.t5_residual import T5Residual
from ..vae.codec import LatentCodec
from .batches import Fitted, fit
from .objective import Draw

Features = Mapping[str, Tensor]
"""What text encoders say about a batch of captions, by name, each (batch, ...); see `text_features`."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one bucket.

    Attributes:
        latents: (batch, c, h, w) float32 in the denoiser's scale, on the run's device.
        said: the conditioning of these samples, without the text that was dropped.
    """

    latents: Tensor
    said: Callable[[Draw], Conditioning]


class Source(Protocol):
    """Gives samples by number, in two steps: what threads may do ahead, and what is done for a whole batch when its turn has come."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The text encoders and the conditioner that its conditionings go through, by component; gradients reach those that ask for them."""
        ...

    def read(self, number: int, size: tuple[int, int], cut: torch.Generator | None) -> Any:
        """Read one sample for a bucket of `size` (width, height); a picture is cut with the generator, or in the middle without one.

        Raises:
            DataError: it is damaged.
        """
        ...

    def batch(self, rows: Sequence[Any], posteriors: Sequence[torch.Generator] | None) -> Batch:
        """Make a batch of what `read` returned; one generator a sample draws its latents from their posterior, None takes the means."""
        ...


@dataclass(frozen=True, eq=False)
class Join:
    """How text features become a conditioning, and what stands for a caption that was dropped.

    Attributes:
        family: of the model, see `ModelFolder`.
        factor: pixels to a latent position.
        conditioner: joins CLIP and T5 and drops either by itself, or adds T5 to CLIP; None for families without T5.
        empty: where nothing joins, the features of a dropped caption, of one row: those of "", or zeros where the model has it so.
        zero: whether they are zeros.
    """

    family: str
    factor: int
    conditioner: Conditioner | T5Residual | None
    empty: Features
    zero: bool

    def __call__(self, features: Features, sizes: Tensor, latents: Tensor, drawn: Draw) -> Conditioning:
        """The conditioning of a batch.

        SD and SDXL have no T5: a row keeps its caption unless CLIP's is dropped, and what takes its place is what `generate` uses without a
        negative prompt. SDXL is told the size and cut of each picture.

        Args:
            features: of the captions.
            sizes: (batch, 4): height and width of each picture before it was cut, top and left of its cut (`Fitted`), pixels.
            latents: (batch, c, h, w), for their size.
            drawn: says what is dropped.
        """
        if isinstance(self.conditioner, Conditioner):
            keep_clip, keep_t5 = (keep.to(latents.device) for keep in (drawn.keep_clip, drawn.keep_t5))
            return self.conditioner(**_without_common_pads(features), keep_clip=keep_clip, keep_t5=keep_t5)
        keep = drawn.keep_clip.to(latents.device)
        tokens = torch.where(keep[:, None, None], features["tokens"], self.empty["tokens"])
        if isinstance(self.conditioner, T5Residual):
            mask = features["t5_mask"] & drawn.keep_t5.to(latents.device)[:, None]
            tokens = self.conditioner(tokens, features["t5_tokens"], mask)
        if not self.family.startswith("sdxl"):
            return Conditioning(tokens)
        return Conditioning(
            tokens, pooled=torch.where(keep[:, None], features["pooled"], self.empty["pooled"]), size_ids=self._size_ids(sizes, latents)
        )

    def _size_ids(self, sizes: Tensor, latents: Tensor) -> Tensor:
        """SDXL's micro-conditioning (Podell et al. 2023, section 2.2); the refiner's ends in an aesthetic score, that of good pictures."""
        height, width = (self.factor * side for side in latents.shape[2:])
        told = (AESTHETIC_SCORE,) if self.family.startswith("sdxl-refiner") else (height, width)
        return torch.cat([sizes.float(), sizes.new_tensor(told, dtype=torch.float32).expand(len(sizes), -1)], dim=1).to(latents.device)


def _without_common_pads(features: Features) -> Features:
    """Leave out CLIP's and T5's tokens that are pads in every row: masked, they say nothing, and captions are short beside what an encoder takes."""
    used = {encoder: features[f"{encoder}_mask"].any(dim=0) for encoder in ("clip", "t5")}
    return {**features, **{f"{encoder}_{what}": features[f"{encoder}_{what}"][:, used[encoder]] for encoder in used for what in ("tokens", "mask")}}


def make_join(folder: ModelFolder, conditioner: Conditioner | T5Residual | None, empty: Features) -> Join:
    """The join of a model; `empty` are the features of one "", which SDXL's zero_negative turns to zeros."""
    zero = folder.zero_negative and folder.family.startswith("sdxl")
    features = {name: torch.zeros_like(tensor) if zero else tensor for name, tensor in empty.items()}
    return Join(folder.family, folder.factor, conditioner, features, zero)


def text_features(parts: TextParts, captions: Sequence[str]) -> dict[str, Tensor]:
    """Run the text encoders, up to what is dropped or joined; one row a caption.

    Returns:
        SD and T5 alone: tokens (batch, n, width) after the final norm. SDXL and its refiner: tokens of the penultimate layers and pooled (batch,
        width). CLIP with T5: clip_tokens, clip_mask (bool, False at pads), clip_pooled, t5_tokens, t5_mask, the arguments of `Conditioner`. SD with
        T5, SDXL with T5: SD's or SDXL's and t5_tokens, t5_mask.
    """
    if isinstance(parts, ClipT5Part):
        said = embed_clip_t5(captions, parts.clip, parts.t5)
        return {name: getattr(said, name) for name in ("clip_tokens", "clip_mask", "clip_pooled", "t5_tokens", "t5_mask")}
    if isinstance(parts, ClipPart):
        return {"tokens": encode_sd(captions, parts).conditioning.tokens}
    if isinstance(parts, T5Part):
        return {"tokens": encode_t5(captions, parts).conditioning.tokens}
    if isinstance(parts, SdT5Part | SdxlT5Part):
        t5_tokens, t5_mask, _ = embed_t5(captions, parts.t5)
        beside = text_features(parts.clip if isinstance(parts, SdT5Part) else parts.towers, captions)
        return {**beside, "t5_tokens": t5_tokens, "t5_mask": t5_mask}
    encoded = encode_sdxl(captions, *parts, size_ids=()).conditioning
    assert encoded.pooled is not None
    return {"tokens": encoded.tokens, "pooled": encoded.pooled}


def text_networks(parts: TextParts) -> dict[str, nn.Module]:
    """The text encoders and the conditioner of a model, by component."""
    if isinstance(parts, ClipT5Part | SdT5Part):
        return {"text_encoder": parts.clip.model, "text_encoder_2": parts.t5.model, "conditioner": parts.conditioner}
    if isinstance(parts, SdxlT5Part):
        return {**text_networks(parts.towers), "text_encoder_3": parts.t5.model, "conditioner": parts.conditioner}
    towers = (parts, None) if isinstance(parts, ClipPart | T5Part) else parts
    return {name: tower.model for name, tower in zip(("text_encoder", "text_encoder_2"), towers, strict=True) if tower is not None}


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Pictures and captions, encoded when they are needed: the VAE and the text encoders are in memory and run at every step."""

    index: ShardIndex
    codec: LatentCodec
    parts: TextParts
    join: Join
    device: torch.device

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """See `Source`."""
        return text_networks(self.parts)

    def read(self, number: int, size: tuple[int, int], cut: torch.Generator | None) -> tuple[Fitted, str]:
        """See `Source`."""
        return fit(self.index.picture(number), size, cut), self.index.samples[number].caption

    def batch(self, rows: Sequence[tuple[Fitted, str]], posteriors: Sequence[torch.Generator] | None) -> Batch:
        """See `Source`."""
        fitted, captions = [one for one, _ in rows], [caption for _, caption in rows]
        latents = self.codec.encode(torch.stack([one.pixels for one in fitted]).to(self.device), posteriors).latents
        sizes = torch.tensor([[*one.original, *one.corner] for one in fitted])
        return Batch(latents, lambda drawn: self._join()(text_features(self.parts, captions), sizes, latents, drawn))

    def _join(self) -> Join:
        """The join, with what stands for a dropped caption as the encoders say it now, in case they are trained."""
        trained = any(parameter.requires_grad for network in self.networks.values() for parameter in network.parameters())
        if not trained or self.join.zero or isinstance(self.join.conditioner, Conditioner):
            return self.join
        return replace(self.join, empty=text_features(self.parts, [""]))


def picture_source(folder: ModelFolder, index: ShardIndex, codec: LatentCodec, parts: TextParts, device: torch.device) -> PictureSource:
    """A source of pictures and captions with the frozen parts of a model."""
    if isinstance(parts, ClipT5Part):
        return PictureSource(index, codec, parts, make_join(folder, parts.conditioner, {}), device)
    conditioner = parts.conditioner if isinstance(parts, SdT5Part | SdxlT5Part) else None
    return PictureSource(index, codec, parts, make_join(folder, conditioner, text_features(parts, [""])), device)
