"""From prompts to a `Conditioning`, one function for each family of models: SD 1.x and 2.x, SDXL, T5 alone, and the CLIP/T5 join.

Within a call each distinct text is tokenized and encoded once. Gradients reach the encoders whose weights ask for them; loaded ones do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contracts import Conditioning
from ..errors import ModelError, UsageError
from .clip import CLIPText, CLIPTextOutput
from .conditioner import Conditioner
from .t5 import T5Encoder
from .tokenizer import Tokenizer, Tokens


@dataclass(frozen=True, eq=False)
class ClipPart:
    """A CLIP text tower with its tokenizer."""

    tokenizer: Tokenizer
    model: CLIPText

    def __post_init__(self) -> None:
        positions = self.model.config.max_position_embeddings
        if self.tokenizer.length > positions:
            raise ModelError(f"the CLIP tokenizer gives {self.tokenizer.length} tokens; at most {positions} was wanted; state a shorter length")


@dataclass(frozen=True, eq=False)
class T5Part:
    """A T5 encoder with its tokenizer, whose length is the limit.

    Attributes:
        tokenizer: its tokenizer.
        model: the encoder.
        masked: whether pads are hidden from it.
    """

    tokenizer: Tokenizer
    model: T5Encoder
    masked: bool = True


@dataclass(frozen=True, eq=False)
class ClipT5Part:
    """The two encoders and their join, checked to fit together."""

    clip: ClipPart
    t5: T5Part
    conditioner: Conditioner

    def __post_init__(self) -> None:
        config, clip = self.conditioner.config, self.clip.model.config
        if self.clip.model.text_projection is None:
            raise ModelError("the CLIP text tower has no text_projection; one was wanted for the pooled vector; use a CLIPTextModelWithProjection")
        came = (clip.hidden_size, clip.projection_dim, self.t5.model.config.d_model)
        wanted = (config.clip_width, config.clip_pooled_width, config.t5_width)
        if came != wanted:
            raise ModelError(
                f"the encoders' widths (CLIP, pooled, T5) are {came}; the conditioner wanted {wanted}; use the encoders it was trained with"
            )


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


def encode_sd(prompts: Sequence[str], clip: ClipPart, clip_skip: int = 0) -> Encoded:
    """Encode for SD 1.x and 2.x: one tower, the final norm over the chosen layer's output, pads not masked.

    SD 2.x files hold one layer less than OpenCLIP ViT-H, so that their last layer is already the penultimate one.

    Args:
        prompts: any number.
        clip: the tower.
        clip_skip: layers left out at the end, 0 to the number of layers. diffusers never skips for the negative prompt.

    Raises:
        UsageError: more layers to skip than there are.
    """
    texts, row = _distinct(prompts)
    tokens, output = _run_clip(clip, texts)
    hidden = clip.model.final_norm(_skipped(output, clip_skip, already=0))
    return Encoded(Conditioning(tokens=hidden[row.to(hidden.device)]), _overflows(row, {"clip": tokens}))


def encode_sdxl(
    prompts: Sequence[str | None],
    clip: ClipPart | None,
    clip_2: ClipPart,
    size_ids: Sequence[float],
    clip_skip: int = 0,
    force_zeros_for_empty_prompt: bool = True,
) -> Encoded:
    """Encode for SDXL (Podell et al. 2023, section 2): the penultimate layers of two towers joined on the feature axis.

    Args:
        prompts: any number; None stands for "no negative prompt", which "" does not.
        clip: CLIP ViT-L; None for the refiner, which has the second tower only.
        clip_2: OpenCLIP bigG, with projection; its projected pooled vector conditions the U-Net.
        size_ids: for all rows; base: original height and width, crop top and left, target height and width (pixels); refiner: the first
            four and the aesthetic score.
        clip_skip: layers left out before the penultimate one.
        force_zeros_for_empty_prompt: the model's option of that name: None becomes zeros instead of the encoding of "".

    Raises:
        UsageError: more layers to skip than there are.
        ModelError: a second tower without projection, or towers of different lengths.
    """
    texts, row = _distinct(["" if prompt is None else prompt for prompt in prompts])
    tokens_2, output_2 = _run_clip(clip_2, texts)
    if output_2.projected is None:
        raise ModelError("the second SDXL text encoder has no text_projection; a CLIPTextModelWithProjection was wanted; repair the model folder")
    hidden = _skipped(output_2, clip_skip, already=1)
    overflow = {"clip_2": tokens_2}
    if clip is not None:
        if clip.tokenizer.length != clip_2.tokenizer.length:
            lengths = f"{clip.tokenizer.length} and {clip_2.tokenizer.length}"
            raise ModelError(f"the SDXL tokenizers give {lengths} tokens; equal lengths were wanted; repair the model folder")
        tokens, output = _run_clip(clip, texts)
        hidden = torch.cat([_skipped(output, clip_skip, already=1).to(hidden), hidden], dim=-1)
        overflow = {"clip": tokens, **overflow}
    row_here = row.to(hidden.device)
    told = torch.tensor([prompt is not None or not force_zeros_for_empty_prompt for prompt in prompts], device=hidden.device)
    conditioning = Conditioning(
        tokens=hidden[row_here] * told[:, None, None],
        pooled=output_2.projected[row_here] * told[:, None],
        size_ids=torch.tensor(size_ids, dtype=torch.float32, device=hidden.device).expand(len(prompts), -1),
    )
    return Encoded(conditioning, _overflows(row, overflow))


def encode_t5(prompts: Sequence[str], t5: T5Part) -> Encoded:
    """Encode for a U-Net that reads T5 alone (as DeepFloyd's), pads included: such networks were trained with them."""
    texts, row = _distinct(prompts)
    tokens, hidden = _run_t5(t5, texts)
    return Encoded(Conditioning(tokens=hidden[row.to(hidden.device)]), _overflows(row, {"t5": tokens}))


def embed_clip_t5(prompts: Sequence[str], clip: ClipPart, t5: T5Part) -> Embedded:
    """Run the two frozen encoders of the CLIP/T5 join: CLIP's tokens after its final norm and its projected vector, T5's tokens under its mask.

    Raises:
        ModelError: a tower without projection.
    """
    texts, row = _distinct(prompts)
    clip_tokens, output = _run_clip(clip, texts)
    if output.projected is None:
        raise ModelError("the CLIP text tower has no text_projection; one was wanted for the pooled vector; use a CLIPTextModelWithProjection")
    t5_tokens, t5_hidden = _run_t5(t5, texts)
    clip_row, t5_row = row.to(output.pooled.device), row.to(t5_hidden.device)
    return Embedded(
        clip_tokens=output.last_hidden_state[clip_row],
        clip_mask=clip_tokens.mask.to(clip_row.device)[clip_row],
        clip_pooled=output.projected[clip_row],
        t5_tokens=t5_hidden[t5_row],
        t5_mask=t5_tokens.mask.to(t5_row.device)[t5_row],
        overflow=_overflows(row, {"clip": clip_tokens, "t5": t5_tokens}),
    )


def encode_clip_t5(prompts: Sequence[str], part: ClipT5Part) -> Encoded:
    """Encode for the models of this project: CLIP and T5 joined along the sequence (eDiff-I, Balaji et al. 2022, section 4.2).

    An empty prompt is what the network saw in training when a caption was dropped: no token of either encoder, only the learned null token.
    """
    embedded = embed_clip_t5(prompts, part.clip, part.t5)
    weight = part.conditioner.null_token
    said = torch.tensor([prompt != "" for prompt in prompts], device=weight.device)
    conditioning = part.conditioner(
        embedded.clip_tokens.to(weight),
        embedded.clip_mask.to(weight.device),
        embedded.clip_pooled.to(weight),
        embedded.t5_tokens.to(weight),
        embedded.t5_mask.to(weight.device),
        keep_clip=said,
        keep_t5=said,
    )
    return Encoded(conditioning, embedded.overflow)


def _distinct(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct texts, and for each prompt the row of its text among them."""
    rows = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    return list(rows), torch.tensor([rows[prompt] for prompt in prompts], dtype=torch.int64)


def _run_clip(part: ClipPart, texts: Sequence[str]) -> tuple[Tokens, CLIPTextOutput]:
    tokens = part.tokenizer.encode(texts)
    ids = _known_ids(tokens, part.model, part.model.config.vocab_size)
    return tokens, part.model(ids, tokens.mask.to(ids.device) if part.model.config.use_attention_mask else None)


def _run_t5(part: T5Part, texts: Sequence[str]) -> tuple[Tokens, Tensor]:
    tokens = part.tokenizer.encode(texts)
    ids = _known_ids(tokens, part.model, part.model.config.vocab_size)
    return tokens, part.model(ids, tokens.mask.to(ids.device) if part.masked else None)


def _known_ids(tokens: Tokens, model: nn.Module, vocab_size: int) -> Tensor:
    """The ids on the model's device; ModelError when the tokenizer belongs to a larger vocabulary."""
    if tokens.ids.numel() and int(tokens.ids.max()) >= vocab_size:
        raise ModelError(f"the tokenizer gives id {int(tokens.ids.max())}; less than {vocab_size} was wanted; use the tokenizer of this text encoder")
    return tokens.ids.to(next(model.parameters()).device)


def _skipped(output: CLIPTextOutput, clip_skip: int, already: int) -> Tensor:
    """The hidden state that many layers before the last, beyond those the family leaves out already."""
    most = len(output.hidden_states) - 1 - already
    if not 0 <= clip_skip <= most:
        raise UsageError(f"clip_skip is {clip_skip}; a number from 0 to {most} was wanted for this text encoder; choose one of them")
    return output.hidden_states[-1 - already - clip_skip]


def _overflows(row: Tensor, tokens: Mapping[str, Tokens]) -> list[dict[str, str]]:
    return [{name: batch.overflow[i] for name, batch in tokens.items() if batch.overflow[i]} for i in row.tolist()]
