"""From prompts to a `Conditioning`, one function for each family of models: SD 1.x and 2.x, SDXL, T5 alone, and the CLIP/T5 join.

Within a call each distinct text is tokenized and encoded once. Gradients reach the encoders whose weights ask for them; loaded ones do not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..contracts import Conditioning
from ..errors import ModelError, UsageError
from ..offload import device_of
from .clip import CLIPTextOutput
from .parts import ClipPart, ClipT5Part, SdT5Part, SdxlT5Part, T5Part
from .prompts import Reading, joined
from .tokenizer import Chunks

AS_IN_TRAINING = Reading()


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of prompts, encoded.

    Attributes:
        conditioning: one row a prompt.
        overflow: for each prompt the words beyond an encoder's limit, by the encoder's name (`clip`, `clip_2`, `t5`); empty when all fit.
    """

    conditioning: Conditioning
    overflow: list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class Embedded:
    """What CLIP and T5 say about a batch of prompts, before the join: the arguments of `Conditioner`, and `Encoded.overflow`."""

    clip_tokens: Tensor
    clip_mask: Tensor
    clip_pooled: Tensor
    t5_tokens: Tensor
    t5_mask: Tensor
    overflow: list[dict[str, str]]


def encode_sd(prompts: Sequence[str], clip: ClipPart, clip_skip: int = 0, reading: Reading = AS_IN_TRAINING, least: int = 1) -> Encoded:
    """Encode for SD 1.x and 2.x: one tower, the final norm over the chosen layer's output, pads not masked.

    SD 2.x files hold one layer less than OpenCLIP ViT-H, so that their last layer is already the penultimate one.

    Args:
        prompts: any number.
        clip: the tower.
        clip_skip: layers left out at the end, 0 to the number of layers. diffusers never skips for the negative prompt.
        reading: how they are read.
        least: number of chunks; see `chunk_count`.

    Raises:
        UsageError: more layers to skip than there are, or weights that cannot be read.
    """
    texts, row = _distinct(prompts)
    said = _run_clip(clip, texts, reading, least, lambda output: clip.model.final_norm(_skipped(output, clip_skip, already=0)))
    return Encoded(Conditioning(tokens=said.tokens[row.to(said.tokens.device)]), _overflows(row, {"clip": said.overflow}))


def encode_sd_t5(prompts: Sequence[str], part: SdT5Part, reading: Reading = AS_IN_TRAINING, least: int = 1) -> Encoded:
    """Encode as `encode_sd`, and add what T5 says; of an empty prompt it says nothing, as of a dropped caption in training."""
    return _with_t5(encode_sd(prompts, part.clip, reading=reading, least=least), prompts, part, reading)


def encode_sdxl_t5(
    prompts: Sequence[str | None],
    part: SdxlT5Part,
    size_ids: Sequence[float],
    force_zeros_for_empty_prompt: bool = True,
    reading: Reading = AS_IN_TRAINING,
    least: int = 1,
) -> Encoded:
    """Encode as `encode_sdxl`, and add what T5 says to the tokens; of an empty prompt or None it says nothing. The pooled vector stays CLIP's."""
    encoded = encode_sdxl(prompts, *part.towers, size_ids, 0, force_zeros_for_empty_prompt, reading, least)
    return _with_t5(encoded, ["" if prompt is None else prompt for prompt in prompts], part, reading)


def _with_t5(encoded: Encoded, prompts: Sequence[str], part: SdT5Part | SdxlT5Part, reading: Reading) -> Encoded:
    if reading.t5_weight == 0:
        return encoded
    tokens = encoded.conditioning.tokens
    t5_tokens, t5_mask, overflow = embed_t5(prompts, part.t5, reading)
    said = torch.tensor([prompt != "" for prompt in prompts], device=t5_mask.device)
    tokens = part.conditioner(tokens, t5_tokens.to(tokens), (t5_mask & said[:, None]).to(tokens.device), reading.t5_weight)
    both = [one | other for one, other in zip(encoded.overflow, overflow, strict=True)]
    return Encoded(replace(encoded.conditioning, tokens=tokens), both)


def embed_t5(prompts: Sequence[str], t5: T5Part, reading: Reading = AS_IN_TRAINING) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
    """Run T5, which knows no chunks: it reads the whole of a prompt up to its own limit.

    Returns:
        Tokens (prompts, tokens, d_model), their mask, and `Encoded.overflow`.
    """
    texts, row = _distinct(prompts)
    said = _run_t5(t5, texts, reading)
    here = row.to(said.tokens.device)
    return said.tokens[here], said.mask[here], _overflows(row, {"t5": said.overflow})


def encode_sdxl(
    prompts: Sequence[str | None],
    clip: ClipPart | None,
    clip_2: ClipPart,
    size_ids: Sequence[float],
    clip_skip: int = 0,
    force_zeros_for_empty_prompt: bool = True,
    reading: Reading = AS_IN_TRAINING,
    least: int = 1,
) -> Encoded:
    """Encode for SDXL (Podell et al. 2023, section 2): the penultimate layers of two towers joined on the feature axis.

    Args:
        prompts: any number; None stands for "no negative prompt", which "" does not.
        clip: CLIP ViT-L; None for the refiner, which has the second tower only.
        clip_2: OpenCLIP bigG, with projection; its projected pooled vector, of the first chunk, conditions the U-Net.
        size_ids: for all rows; base: original height and width, crop top and left, target height and width (pixels); refiner: the first
            four and the aesthetic score.
        clip_skip: layers left out before the penultimate one.
        force_zeros_for_empty_prompt: the model's option of that name: None becomes zeros instead of the encoding of "".
        reading: how they are read.
        least: number of chunks; see `chunk_count`.

    Raises:
        UsageError: more layers to skip than there are, or weights that cannot be read.
        ModelError: a second tower without projection, or towers of different lengths.
    """
    texts, row = _distinct(["" if prompt is None else prompt for prompt in prompts])
    least = max(least, chunk_count(texts, [tower for tower in (clip, clip_2) if tower is not None], reading))

    def penultimate(output: CLIPTextOutput) -> Tensor:
        return _skipped(output, clip_skip, already=1)

    said_2 = _run_clip(clip_2, texts, reading, least, penultimate)
    if said_2.projected is None:
        raise ModelError("the second SDXL text encoder has no text_projection; a CLIPTextModelWithProjection was wanted; repair the model folder")
    hidden, overflow = said_2.tokens, {"clip_2": said_2.overflow}
    if clip is not None:
        if clip.tokenizer.length != clip_2.tokenizer.length:
            lengths = f"{clip.tokenizer.length} and {clip_2.tokenizer.length}"
            raise ModelError(f"the SDXL tokenizers give {lengths} tokens; equal lengths were wanted; repair the model folder")
        said = _run_clip(clip, texts, reading, least, penultimate)
        hidden = torch.cat([said.tokens.to(hidden), hidden], dim=-1)
        overflow = {"clip": said.overflow, **overflow}
    row_here = row.to(hidden.device)
    told = torch.tensor([prompt is not None or not force_zeros_for_empty_prompt for prompt in prompts], device=hidden.device)
    conditioning = Conditioning(
        tokens=hidden[row_here] * told[:, None, None],
        pooled=said_2.projected[row_here] * told[:, None],
        size_ids=torch.tensor(size_ids, dtype=torch.float32, device=hidden.device).expand(len(prompts), -1),
    )
    return Encoded(conditioning, _overflows(row, overflow))


def encode_t5(prompts: Sequence[str], t5: T5Part, reading: Reading = AS_IN_TRAINING) -> Encoded:
    """Encode for a U-Net that reads T5 alone (as DeepFloyd's), pads included: such networks were trained with them."""
    tokens, _, overflow = embed_t5(prompts, t5, reading)
    return Encoded(Conditioning(tokens), overflow)


def embed_clip_t5(prompts: Sequence[str], clip: ClipPart, t5: T5Part | None, reading: Reading = AS_IN_TRAINING) -> Embedded:
    """Run the two frozen encoders of the CLIP/T5 join: CLIP's tokens after its final norm and its projected vector, T5's tokens under its mask.

    Without T5 there are no T5 tokens, and they have no width.

    Raises:
        UsageError: weights that cannot be read.
        ModelError: a tower without projection.
    """
    texts, row = _distinct(prompts)
    said = _run_clip(clip, texts, reading, 1, lambda output: output.last_hidden_state)
    if said.projected is None:
        raise ModelError("the CLIP text tower has no text_projection; one was wanted for the pooled vector; use a CLIPTextModelWithProjection")
    clip_row, overflow = row.to(said.tokens.device), _overflows(row, {"clip": said.overflow})
    t5_tokens, t5_mask = said.tokens.new_zeros(len(prompts), 0, 0), said.mask.new_zeros(len(prompts), 0)
    if t5 is not None:
        t5_tokens, t5_mask, beyond = embed_t5(prompts, t5, reading)
        overflow = [one | other for one, other in zip(overflow, beyond, strict=True)]
    return Embedded(
        clip_tokens=said.tokens[clip_row],
        clip_mask=said.mask[clip_row],
        clip_pooled=said.projected[clip_row],
        t5_tokens=t5_tokens,
        t5_mask=t5_mask,
        overflow=overflow,
    )


def encode_clip_t5(prompts: Sequence[str], part: ClipT5Part, reading: Reading = AS_IN_TRAINING) -> Encoded:
    """Encode for the models of this project: CLIP and T5 joined along the sequence (eDiff-I, Balaji et al. 2022, section 4.2).

    An empty prompt is what the network saw in training when a caption was dropped: no token of either encoder, only the learned null token.
    """
    embedded = embed_clip_t5(prompts, part.clip, None if reading.t5_weight == 0 else part.t5, reading)
    device, dtype = device_of(part.conditioner), part.conditioner.null_token.dtype
    said = torch.tensor([prompt != "" for prompt in prompts], device=device)
    conditioning = part.conditioner(
        embedded.clip_tokens.to(device, dtype),
        embedded.clip_mask.to(device),
        embedded.clip_pooled.to(device, dtype),
        embedded.t5_tokens.to(device, dtype)
        if reading.t5_weight
        else torch.zeros(len(prompts), 0, part.conditioner.config.t5_width, device=device, dtype=dtype),
        embedded.t5_mask.to(device),
        keep_clip=said,
        keep_t5=said,
        clip_weight=reading.clip_weight,
        t5_weight=reading.t5_weight,
    )
    return Encoded(conditioning, embedded.overflow)


def chunk_count(prompts: Sequence[str], towers: Sequence[ClipPart], reading: Reading) -> int:
    """The most chunks that one of the prompts takes with one of the towers.

    A prompt and its negative are encoded with as many chunks: families that know no mask see empty ones at the end of the shorter, as is customary.
    """
    return max(len(tower.tokenizer.chunks(reading.parts(text), reading.split).ids) for tower in towers for text in prompts)


@dataclass(frozen=True, eq=False)
class _Said:
    """What an encoder says about texts: tokens (texts, tokens, width), their mask, CLIP's projected (texts, width), and what did not fit."""

    tokens: Tensor
    mask: Tensor
    projected: Tensor | None
    overflow: list[str]


def _distinct(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct texts, and for each prompt the row of its text among them."""
    rows = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    return list(rows), torch.tensor([rows[prompt] for prompt in prompts], dtype=torch.int64)


def _run_clip(part: ClipPart, texts: Sequence[str], reading: Reading, least: int, hidden: Callable[[CLIPTextOutput], Tensor]) -> _Said:
    """Encode texts chunk by chunk; `hidden` picks the tokens, which are joined along the sequence."""
    most = max(least, chunk_count(texts, [part], reading))
    rows = [part.tokenizer.chunks(reading.parts(text), reading.split, most) for text in texts]
    output, mask = _clip_rows(part, rows)
    tokens = hidden(output).unflatten(0, (len(texts), most))
    tokens = _weighted(tokens, rows, lambda: hidden(_clip_rows(part, [part.tokenizer.chunks(Reading().parts(""), split=False)])[0]))
    projected = None if output.projected is None else output.projected.unflatten(0, (len(texts), most))[:, 0]
    return _Said(tokens.flatten(1, 2), mask.reshape(len(texts), -1), projected, [row.overflow for row in rows])


def _clip_rows(part: ClipPart, rows: Sequence[Chunks]) -> tuple[CLIPTextOutput, Tensor]:
    ids = _known_ids(torch.cat([row.ids for row in rows]), part.model, part.model.config.vocab_size)
    mask = torch.cat([row.mask for row in rows]).to(ids.device)
    return part.model(ids, mask if part.model.config.use_attention_mask else None), mask


def _run_t5(part: T5Part, texts: Sequence[str], reading: Reading) -> _Said:
    rows = [part.tokenizer.chunks((joined(reading.parts(text)),), split=False) for text in texts]
    tokens, mask = _t5_rows(part, rows)
    tokens = _weighted(tokens[:, None], rows, lambda: _t5_rows(part, [part.tokenizer.chunks(Reading().parts(""), split=False)])[0])[:, 0]
    return _Said(tokens, mask, None, [row.overflow for row in rows])


def _t5_rows(part: T5Part, rows: Sequence[Chunks]) -> tuple[Tensor, Tensor]:
    ids = _known_ids(torch.cat([row.ids for row in rows]), part.model, part.model.config.vocab_size)
    mask = torch.cat([row.mask for row in rows]).to(ids.device)
    return part.model(ids, mask if part.masked else None), mask


def _weighted(tokens: Tensor, rows: Sequence[Chunks], empty: Callable[[], Tensor]) -> Tensor:
    """Move each token away from what the encoder says of an empty prompt at its place: z0 + w·(z - z0), ComfyUI's formula (`encode_token_weights`).

    Args:
        tokens: (texts, chunks, length, width).
        rows: their weights; tokens of weight 1 come out as they are.
        empty: gives (1, length, width).
    """
    if all(row.weights is None for row in rows):
        return tokens
    weights = torch.stack([torch.ones(row.ids.shape) if row.weights is None else row.weights for row in rows])[..., None].to(tokens)
    base = empty()[:, None]
    return torch.where(weights == 1, tokens, base + weights * (tokens - base))


def _known_ids(ids: Tensor, model: nn.Module, vocab_size: int) -> Tensor:
    """The ids on the model's device; ModelError when the tokenizer belongs to a larger vocabulary."""
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ModelError(f"the tokenizer gives id {int(ids.max())}; less than {vocab_size} was wanted; use the tokenizer of this text encoder")
    return ids.to(device_of(model))


def _skipped(output: CLIPTextOutput, clip_skip: int, already: int) -> Tensor:
    """The hidden state that many layers before the last, beyond those the family leaves out already."""
    most = len(output.hidden_states) - 1 - already
    if not 0 <= clip_skip <= most:
        raise UsageError(f"clip_skip is {clip_skip}; a number from 0 to {most} was wanted for this text encoder; choose one of them")
    return output.hidden_states[-1 - already - clip_skip]


def _overflows(row: Tensor, overflow: Mapping[str, list[str]]) -> list[dict[str, str]]:
    return [{name: words[i] for name, words in overflow.items() if words[i]} for i in row.tolist()]
