"""The shape of a cross-attention U-Net: the fields of diffusers' `UNet2DConditionModel` config.json that our network covers.

Everything else is refused by name, so that the caller can fall back to diffusers' own class instead of computing something else in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ModelError

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCK = "UNetMidBlock2DCrossAttn"
MAX_BLOCKS = 512  # layers of all levels times the deepest transformer; SDXL has 60

# Fields of the format that we know and cover in one setting only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Fields that say nothing about the network: the heads of an embedding we refuse, and what diffusers' EMAModel writes beside them.
_IGNORED = {"addition_embed_type_num_heads"} | {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}
_PER_LEVEL = ("attention_head_dim", "transformer_layers_per_block", "layers_per_block")


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net's shape; the defaults are diffusers' (Stable Diffusion 1.x but for `cross_attention_dim`).

    Attributes:
        sample_size: height and width of the latents it was trained on; not used by the network.
        in_channels: latent channels in (9 for inpainting: latents, mask, masked latents).
        out_channels: latent channels out.
        flip_sin_to_cos: order of the timestep embedding: cosines first.
        freq_shift: 0 or 1; the embedding's lowest frequency is 10000^(-(h-1)/(h-freq_shift)) for h = half its width.
        down_block_types: one of `DOWN_BLOCKS` a level, from the highest resolution to the lowest.
        mid_block_type: `MID_BLOCK`, or None for no middle block.
        up_block_types: one of `UP_BLOCKS` a level, from the lowest resolution to the highest.
        block_out_channels: width of each level.
        layers_per_block: residual blocks a level (up levels have one more).
        dropout: in residual blocks, while training.
        norm_num_groups: groups of every group norm.
        norm_eps: of the residual blocks' group norms.
        cross_attention_dim: width of the text tokens.
        transformer_layers_per_block: transformer layers in each attention block of a level.
        reverse_transformer_layers_per_block: the same for the up levels, in their order; the reverse of the above when None.
        encoder_hid_dim: width of tokens that come unprojected; None when they come in `cross_attention_dim`.
        attention_head_dim: number of heads (!) a level; the name is the format's old mistake.
        use_linear_projection: attention blocks project with linear layers (SD 2, SDXL), else with 1×1 convolutions.
        class_embed_type: "projection" adds an MLP of a vector (our pooled text) to the time embedding.
        addition_embed_type: "text_time" adds an MLP of pooled text and size ids (SDXL).
        addition_time_embed_dim: width of each size id's embedding.
        projection_class_embeddings_input_dim: input width of either MLP.
        upcast_attention: attention in float32 even when the network is half.
        resnet_time_scale_shift: "default" (the time embedding is added) or "scale_shift" (it scales and shifts the second norm).
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = MID_BLOCK
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    encoder_hid_dim: int | None = None
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"

    def __post_init__(self) -> None:
        """Refuse what cannot be built, naming the field and its value."""
        for name, (valid, wanted) in _CHECKS.items():
            if not valid(getattr(self, name)):
                raise _refused(name, getattr(self, name), wanted)
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", *_PER_LEVEL, "reverse_transformer_layers_per_block"):
            value = getattr(self, name)
            if value is not None and len(value) != levels:
                raise _refused(name, value, f"one entry for each of the {levels} levels of block_out_channels")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise _refused("norm_num_groups", self.norm_num_groups, f"a divisor of every width in block_out_channels {self.block_out_channels}")
        if any(width % heads for width, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True)):
            raise _refused(
                "attention_head_dim", self.attention_head_dim, f"numbers of heads that divide block_out_channels {self.block_out_channels}"
            )
        if sum(self.layers_per_block) * max(*self.transformer_layers_per_block, *self.up_transformer_layers) > MAX_BLOCKS:
            raise _refused("transformer_layers_per_block", self.transformer_layers_per_block, f"times all layers_per_block at most {MAX_BLOCKS}")
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            raise _refused("freq_shift", self.freq_shift, "less than half of the first width")
        if self.class_embed_type is not None and self.addition_embed_type is not None:
            raise _refused("class_embed_type", self.class_embed_type, "null beside addition_embed_type (both would take the pooled vector)")
        needed = [] if self.class_embed_type is None and self.addition_embed_type is None else ["projection_class_embeddings_input_dim"]
        for name in needed + (["addition_time_embed_dim"] if self.addition_embed_type is not None else []):
            if getattr(self, name) is None:
                raise _refused(name, None, "a width, which class_embed_type or addition_embed_type needs")

    @property
    def up_transformer_layers(self) -> tuple[int, ...]:
        """Transformer layers of the up levels, in their order."""
        reverse = self.reverse_transformer_layers_per_block
        return self.transformer_layers_per_block[::-1] if reverse is None else reverse

    @classmethod
    def from_dict(cls, json_dict: Mapping[str, Any]) -> "UNetConfig":
        """Read the content of a `unet/config.json`, old spellings included.

        Raises:
            ModelError: a field has a value that we do not cover or that makes no sense, or is unknown and set.
        """
        known = {field.name for field in fields(cls)}
        if json_dict.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
            raise _refused("_class_name", json_dict["_class_name"], "UNet2DConditionModel")
        values: dict[str, Any] = {}
        for name, value in json_dict.items():
            if name in known:
                values[name] = tuple(value) if isinstance(value, list) else value
            elif name in _FIXED:
                if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in _FIXED[name]):
                    raise _refused(name, value, " or ".join(repr(allowed) for allowed in _FIXED[name]))
            elif name == "only_cross_attention":
                if value is not False and (not isinstance(value, list | tuple) or any(entry is not False for entry in value)):
                    raise _refused(name, value, "false")
            elif name == "encoder_hid_dim_type":
                if value not in (None, "text_proj"):
                    raise _refused(name, value, "text_proj or null")
            elif not (name.startswith("_") or name in _IGNORED or value is None or value is False):
                raise _refused(name, value, "no such field")
        if json_dict.get("encoder_hid_dim_type") is not None and json_dict.get("encoder_hid_dim") is None:
            raise _refused("encoder_hid_dim", None, "a width, which encoder_hid_dim_type needs")
        widths = values.get("block_out_channels", cls.block_out_channels)
        levels = len(widths) if isinstance(widths, tuple) else 0
        for name in _PER_LEVEL:
            value = values.get(name, getattr(cls, name)[0])
            values[name] = (value,) * levels if isinstance(value, int) else value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Give the config.json that diffusers' `UNet2DConditionModel` loads."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        hid_type = None if self.encoder_hid_dim is None else "text_proj"
        return {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.38.0", **values, "encoder_hid_dim_type": hid_type}


def _refused(name: str, value: object, wanted: str) -> ModelError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ModelError(f"The U-Net config has {name} = {shown}, wanted was {wanted}; correct config.json or use a model that is covered.")


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _int_check(low: int, high: int, optional: bool = False) -> tuple[Callable[[Any], bool], str]:
    return lambda v: (optional and v is None) or _whole(v, low, high), f"a whole number from {low} to {high}" + (" or null" if optional else "")


def _tuple_check(low: int, high: int, optional: bool = False) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda v: (optional and v is None) or (isinstance(v, tuple) and 1 <= len(v) <= 8 and all(_whole(entry, low, high) for entry in v)),
        f"1 to 8 whole numbers from {low} to {high}" + (" or null" if optional else ""),
    )


def _choice_check(*allowed: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: any(v is option or (isinstance(option, str) and v == option) for option in allowed), f"one of {', '.join(map(repr, allowed))}"


def _types_check(allowed: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, tuple) and all(entry in allowed for entry in v), f"a list of {' and '.join(allowed)}"


# Bounds: far beyond any network that exists, far below what would exhaust memory while a network is laid out.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample_size": (
        lambda v: v is None or _whole(v, 1, 65536) or (isinstance(v, tuple) and len(v) == 2 and all(_whole(side, 1, 65536) for side in v)),
        "one or two whole numbers from 1 to 65536, or null",
    ),
    "in_channels": _int_check(1, 4096),
    "out_channels": _int_check(1, 4096),
    "flip_sin_to_cos": _choice_check(True, False),
    "freq_shift": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "block_out_channels": _tuple_check(4, 16384),
    "down_block_types": _types_check(DOWN_BLOCKS),
    "mid_block_type": _choice_check(MID_BLOCK, None),
    "up_block_types": _types_check(UP_BLOCKS),
    "layers_per_block": _tuple_check(1, 32),
    "dropout": (lambda v: _number(v, 0, 0.999), "a number from 0 to 0.999"),
    "norm_num_groups": _int_check(1, 1024),
    "norm_eps": (lambda v: _number(v, 1e-12, 0.1), "a number from 1e-12 to 0.1"),
    "cross_attention_dim": _int_check(1, 65536),
    "transformer_layers_per_block": _tuple_check(1, 64),
    "reverse_transformer_layers_per_block": _tuple_check(1, 64, optional=True),
    "encoder_hid_dim": _int_check(1, 65536, optional=True),
    "attention_head_dim": _tuple_check(1, 1024),
    "use_linear_projection": _choice_check(True, False),
    "class_embed_type": _choice_check("projection", None),
    "addition_embed_type": _choice_check("text_time", None),
    "addition_time_embed_dim": _int_check(2, 16384, optional=True),
    "projection_class_embeddings_input_dim": _int_check(1, 65536, optional=True),
    "upcast_attention": _choice_check(True, False),
    "resnet_time_scale_shift": _choice_check("default", "scale_shift"),
}
