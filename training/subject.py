"""What is trained: the experts of a model folder in float32, with the frozen encoders and codec around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attention import AttentionBackend
from ..contracts import Conditioning
from ..errors import UsageError
from ..pipeline.folder import ModelFolder
from ..pipeline.loading import TextParts, load_codec, load_text
from ..text_encoders.encode import ClipPart, ClipT5Part, embed_clip_t5, encode_sd, encode_sdxl
from ..unet.config import UNetConfig
from ..unet.deltas import read_expert
from ..unet.experts import ExpertEntry
from ..unet.unet import UNet
from ..vae.codec import LatentCodec
from .batches import Fitted
from .expert_files import verified
from .objective import Draw, Predict

MARGIN = 50  # timesteps beyond its borders that a single expert is trained on: hard disjoint ranges are fragile (MEME, arXiv 2306.04990)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model being trained.

    Attributes:
        folder: what it was loaded from.
        unets: expert's name -> its U-Net, trainable, float32.
        owned: expert's name -> the timesteps [first, end) that it is asked for.
        text: the frozen text encoders.
        codec: pictures to latents.
        device: where all of it is.
    """

    folder: ModelFolder
    unets: nn.ModuleDict
    owned: dict[str, tuple[int, int]]
    text: TextParts
    codec: LatentCodec
    device: torch.device

    @property
    def span(self) -> tuple[int, int]:
        """First timestep trained and one past the last."""
        return min(first for first, _ in self.owned.values()), max(end for _, end in self.owned.values())


def load_subject(folder: ModelFolder, expert: str | None, device: torch.device) -> Subject:
    """Load a model to train all its experts, each on the timesteps it owns, or one of them on its own and a margin.

    Raises:
        UsageError: there is no expert of that name, or one that reads prompts in its own way.
        ModelError: weights that are missing, damaged, not those that were recorded, or do not fit.
    """
    known = {entry.name: entry for entry in folder.experts}
    if expert is not None and expert not in known:
        raise UsageError(f"--expert {expert!r} is not in {folder.name!r}; it has {', '.join(known)}.")
    entries = list(known.values()) if expert is None else [known[expert]]
    for entry in entries:
        if entry.text is not None:
            raise UsageError(f"expert {entry.name!r} reads prompts in its own way; fine-tune the folder it came from, or name another --expert.")
    verified(folder)
    owned = {entry.name: _timesteps(folder, entry) for entry in entries}
    if expert is not None:
        (first, end), last = owned[expert], len(folder.noise.sigmas)
        owned[expert] = (max(0, first - MARGIN), min(last, end + MARGIN))
    backend = AttentionBackend.AUTO
    return Subject(
        folder=folder,
        unets=nn.ModuleDict({entry.name: _trainable(folder, entry) for entry in entries}).to(device),
        owned=owned,
        text=load_text(folder, torch.float32, device, backend),
        codec=load_codec(folder, torch.float32, device, backend)[0],
        device=device,
    )


def _timesteps(folder: ModelFolder, entry: ExpertEntry) -> tuple[int, int]:
    inside = (folder.noise.sigmas >= entry.sigma_min) & (folder.noise.sigmas < entry.sigma_max)
    numbers = inside.nonzero().flatten().tolist()
    if not numbers:
        raise UsageError(f"expert {entry.name!r} owns no training timestep of {folder.name!r}, so there is nothing to train it on.")
    return numbers[0], numbers[-1] + 1


def _trainable(folder: ModelFolder, entry: ExpertEntry) -> UNet:
    unet = UNet(UNetConfig.from_dict(folder.configs[entry.subfolder]))
    state = read_expert(folder.path / entry.subfolder)
    unet.load_state_dict({name: stored.tensor.float() for name, stored in state.items()})
    return unet.train()


def condition(subject: Subject, captions: Sequence[str], drawn: Draw, fitted: Sequence[Fitted]) -> Conditioning:
    """What the text encoders say about captions, without the text that was dropped.

    SD and SDXL have no T5: a row keeps its caption unless CLIP's is dropped, and what takes its place is what `generate` uses without a negative
    prompt. SDXL is told the size and cut of each picture.
    """
    parts = subject.text
    if isinstance(parts, ClipT5Part):
        with torch.no_grad():
            said = embed_clip_t5(captions, parts.clip, parts.t5)
            return parts.conditioner(
                said.clip_tokens,
                said.clip_mask,
                said.clip_pooled,
                said.t5_tokens,
                said.t5_mask,
                keep_clip=drawn.keep_clip.to(said.clip_mask.device),
                keep_t5=drawn.keep_t5.to(said.t5_mask.device),
            )
    kept = drawn.keep_clip.tolist()
    if isinstance(parts, ClipPart):
        return encode_sd([caption if keep else "" for caption, keep in zip(captions, kept, strict=True)], parts).conditioning
    first, second = parts
    texts = [caption if keep else None for caption, keep in zip(captions, kept, strict=True)]
    told = [_size_ids(one, refiner=first is None) for one in fitted]
    encoded = encode_sdxl(texts, first, second, told[0], force_zeros_for_empty_prompt=subject.folder.zero_negative).conditioning
    return replace(encoded, size_ids=torch.tensor(told, dtype=torch.float32, device=encoded.tokens.device))


def _size_ids(one: Fitted, refiner: bool) -> list[float]:
    """SDXL's micro-conditioning of a picture (Podell et al. 2023, section 2.2); the refiner's ends in an aesthetic score, that of good pictures."""
    height, width = one.pixels.shape[1:]
    return [*one.original, *one.corner, *((6.0,) if refiner else (height, width))]


def predictor(subject: Subject, conditioning_of: Callable[[Draw], Conditioning]) -> Predict:
    """Bind captions to the experts: rows go to the expert that owns their timestep."""

    def predict(x: Tensor, t: Tensor, drawn: Draw) -> Tensor:
        said = conditioning_of(drawn)
        owners = [(name, ((t >= first) & (t < end)).nonzero().flatten()) for name, (first, end) in subject.owned.items()]
        outputs = [(rows, _run(subject.unets[name], x[rows], t[rows], said, rows)) for name, rows in owners if len(rows)]
        order = torch.cat([rows for rows, _ in outputs]).argsort()
        return torch.cat([output for _, output in outputs])[order]

    return predict


def _run(unet: nn.Module, x: Tensor, t: Tensor, said: Conditioning, rows: Tensor) -> Tensor:
    mask, pooled, size_ids = (None if part is None else part[rows] for part in (said.mask, said.pooled, said.size_ids))
    assert isinstance(unet, UNet)
    takes_pooled = unet.class_embedding is not None or unet.add_embedding is not None
    keys_values = unet.text_keys_values(said.tokens[rows])
    return unet(x, t, keys_values, mask, pooled if takes_pooled else None, size_ids if unet.add_embedding is not None else None)


def latents_of(subject: Subject, fitted: Sequence[Fitted], generators: Sequence[torch.Generator]) -> Tensor:
    """Encode pictures to latents in the denoiser's scale, (batch, c, h, w) float32, one draw from each posterior."""
    pixels = torch.stack([one.pixels for one in fitted]).to(subject.device)
    return subject.codec.encode(pixels, generators).latents
