"""Text encoders as the families of models have them: towers with their tokenizers, and what joins CLIP and T5, checked to fit together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ..errors import ModelError
from .clip import CLIPText
from .conditioner import Conditioner
from .t5 import T5Encoder
from .t5_residual import T5Residual
from .tokenizer import Tokenizer


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
    """The two encoders and their join, checked to fit together.

    Attributes:
        clip: the tower.
        load_t5: makes the T5 encoder, which often is the largest part of a model.
        conditioner: their join.
    """

    clip: ClipPart
    load_t5: Callable[[], T5Part]
    conditioner: Conditioner

    def __post_init__(self) -> None:
        config, clip = self.conditioner.config, self.clip.model.config
        if self.clip.model.text_projection is None:
            raise ModelError("the CLIP text tower has no text_projection; one was wanted for the pooled vector; use a CLIPTextModelWithProjection")
        _check_widths("CLIP, pooled", (clip.hidden_size, clip.projection_dim), (config.clip_width, config.clip_pooled_width))

    @cached_property
    def t5(self) -> T5Part:
        """The T5 encoder, loaded when it is first asked for.

        Raises:
            ModelError: it does not fit the conditioner.
        """
        return _of_width(self.load_t5(), self.conditioner.config.t5_width)


@dataclass(frozen=True, eq=False)
class SdT5Part:
    """The CLIP tower of SD 1.x or 2.x, and T5, which adds to what it says."""

    clip: ClipPart
    load_t5: Callable[[], T5Part]
    conditioner: T5Residual

    def __post_init__(self) -> None:
        _check_widths("CLIP", (self.clip.model.config.hidden_size,), (self.conditioner.config.clip_width,))

    @cached_property
    def t5(self) -> T5Part:
        """As in `ClipT5Part`."""
        return _of_width(self.load_t5(), self.conditioner.config.t5_width)


@dataclass(frozen=True, eq=False)
class SdxlT5Part:
    """SDXL's two towers (its refiner has only the second), and T5, which adds to what they say together."""

    towers: tuple[ClipPart | None, ClipPart]
    load_t5: Callable[[], T5Part]
    conditioner: T5Residual

    def __post_init__(self) -> None:
        width = sum(tower.model.config.hidden_size for tower in self.towers if tower is not None)
        _check_widths("CLIP", (width,), (self.conditioner.config.clip_width,))

    @cached_property
    def t5(self) -> T5Part:
        """As in `ClipT5Part`."""
        return _of_width(self.load_t5(), self.conditioner.config.t5_width)


def _of_width(part: T5Part, width: int) -> T5Part:
    _check_widths("T5", (part.model.config.d_model,), (width,))
    return part


def _check_widths(what: str, came: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if came != wanted:
        raise ModelError(f"the encoders' widths ({what}) are {came}; the conditioner wanted {wanted}; use the encoders it was trained with")
