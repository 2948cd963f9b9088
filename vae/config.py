"""What a VAE's `config.json` may say, checked before a single weight is allocated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import cast

from ..errors import ModelError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and latent scale of a KL autoencoder: the fields, names and defaults of diffusers' `AutoencoderKL`.

    Attributes:
        in_channels: channels of the pictures that are encoded, 1 to 64.
        out_channels: channels of the pictures that are decoded, 1 to 64.
        down_block_types: `DownEncoderBlock2D`, once a level.
        up_block_types: `UpDecoderBlock2D`, once a level.
        block_out_channels: width of each level from the finest to the coarsest, multiples of norm_num_groups; 1 to 8 levels.
        layers_per_block: residual blocks a level in the encoder (one more in the decoder), 1 to 16.
        act_fn: `silu` (`swish` is the same).
        latent_channels: 1 to 1024.
        norm_num_groups: groups of every GroupNorm.
        sample_size: side in pixels of the training pictures; told, not used.
        scaling_factor: latents are multiplied by it, > 0 (Rombach et al. 2022, section D.1).
        shift_factor: subtracted from the VAE's own latents before scaling (SD3, Flux).
        latents_mean: one mean a latent channel, subtracted before scaling; together with latents_std.
        latents_std: one standard deviation a latent channel, divided by after subtracting, > 0.
        force_upcast: compute in float32 when the weights are float16.
        use_quant_conv: 1×1 convolution after the encoder.
        use_post_quant_conv: 1×1 convolution before the decoder.
        mid_block_add_attention: single-head self-attention at the coarsest level.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        """Check every field; ModelError names the first that is not usable."""
        for name, top in (("in_channels", 64), ("out_channels", 64), ("layers_per_block", 16), ("latent_channels", 1024), ("norm_num_groups", 1024)):
            _require(is_count(getattr(self, name), top), name, getattr(self, name), f"a whole number from 1 to {top}")
        widths = self.block_out_channels
        usable = 1 <= len(widths) <= 8 and all(is_count(w, 8192) and w % self.norm_num_groups == 0 for w in widths)
        _require(usable, "block_out_channels", widths, f"1 to 8 multiples of norm_num_groups ({self.norm_num_groups}), none above 8192")
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            _require(
                getattr(self, name) == (kind,) * len(widths), name, getattr(self, name), f"{kind} {len(widths)} times, as block_out_channels has"
            )
        _require(self.act_fn in ("silu", "swish"), "act_fn", self.act_fn, "silu")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,)
        _require(1 <= len(sizes) <= 2 and all(is_count(s, 65536) for s in sizes), "sample_size", self.sample_size, "a side in pixels, or two")
        _require(is_number(self.scaling_factor) and 1e-6 < self.scaling_factor < 1e6, "scaling_factor", self.scaling_factor, "a number above 0")
        _require(self.shift_factor is None or is_number(self.shift_factor), "shift_factor", self.shift_factor, "a number or null")
        for name in ("latents_mean", "latents_std"):
            values: tuple[float, ...] | None = getattr(self, name)
            usable = values is None or (len(values) == self.latent_channels and all(map(is_number, values)))
            _require(usable, name, values, f"{self.latent_channels} numbers (latent_channels) or null")
        _require(self.latents_std is None or min(self.latents_std) > 0, "latents_std", self.latents_std, "numbers above 0")
        _require((self.latents_mean is None) == (self.latents_std is None), "latents_mean", self.latents_mean, "set together with latents_std")
        _require(self.latents_mean is None or self.shift_factor is None, "shift_factor", self.shift_factor, "null where latents_mean is set")
        for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")

    @property
    def downscale(self) -> int:
        """Pixels to a latent position, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "AutoencoderConfig":
        """Read the content of a `config.json`; keys that begin with an underscore are diffusers' own notes.

        Raises:
            ModelError: a class, key or value that this autoencoder does not cover, named with its value.
        """
        _require(config.get("_class_name", "AutoencoderKL") == "AutoencoderKL", "_class_name", config.get("_class_name"), "AutoencoderKL")
        given = {key: frozen(value) for key, value in config.items() if not key.startswith("_")}
        known = {field.name: field.type for field in fields(cls)}
        for key, value in given.items():
            _require(key in known, key, value, "no such field")
            if str(known[key]).startswith("tuple"):
                _require(isinstance(value, tuple) or (value is None and key.startswith("latents_")), key, value, "a list")
        return cls(**given)  # type: ignore[arg-type]  # __post_init__ checks each value

    def to_dict(self) -> dict[str, object]:
        """Return the content of a `config.json` that diffusers' AutoencoderKL reads too."""
        values: dict[str, object] = {key: list(cast(tuple[object, ...], v)) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {"_class_name": "AutoencoderKL"} | values


def frozen(value: object) -> object:
    """Lists of JSON as tuples."""
    return tuple(cast(Sequence[object], value)) if isinstance(value, (list, tuple)) else value


def is_count(value: object, top: int) -> bool:
    """Whether it is a whole number from 1 to `top`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= top


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, field: str, value: object, wanted: str) -> None:
    if not holds:
        raise ModelError(
            f"The VAE config has {field} = {value!r:.100}; wanted: {wanted}; check that config.json belongs to a diffusers AutoencoderKL."
        )
