"""What else a picture may be made from than a prompt: another picture, a mask, a smaller drawing of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .inputs import InputPicture, examined, picture_from

SHAPE_TOLERANCE = 0.01  # by which the aspect ratio of a mask may differ from its picture's


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A picture to begin with.

    Attributes:
        init_image: the picture.
        strength: 0..1; of the steps, how many are taken: 1 keeps hardly anything of it. With a mask, 1 keeps nothing where it is white.
        resize: how the picture is brought to the size asked for, see `inputs.fitted`.
        mask: white where the picture is repainted, black where it is kept bit for bit; None repaints it all.
        mask_blur: pixels over which the repainted part fades out towards the edge of the mask, inside of it.
    """

    init_image: InputPicture
    strength: float
    resize: str
    mask: InputPicture | None
    mask_blur: float


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """A second round on an enlarged first drawing ("hires fix").

    Attributes:
        factor: both sides are multiplied by it.
        mode: "latent" enlarges the latents (bilinear), "pixel" the decoded picture (Lanczos), which is then encoded again.
        steps: of the second round's schedule.
        strength: 0..1; how many of them are taken.
    """

    factor: float
    mode: str
    steps: int
    strength: float


def resolved_edit(init_image: Path | None, strength: float | None, resize: str | None, mask: Path | None, mask_blur: float | None) -> Edit | None:
    """Read and check the pictures of an edit.

    Args:
        init_image: see `Edit`; None where there is none.
        strength: None is 0.75, with a mask 1.
        resize: None is "crop".
        mask: see `Edit`.
        mask_blur: None is 0.

    Raises:
        UsageError: options that need one which is not given, or a mask of another shape than its picture.
        DataError: see `inputs.examined`.
    """
    for option, needed, value, given in (
        ("strength", "init-image", strength, init_image),
        ("resize", "init-image", resize, init_image),
        ("mask", "init-image", mask, init_image),
        ("mask-blur", "mask", mask_blur, mask),
    ):
        if value is not None and given is None:
            raise UsageError(f"--{option} needs --{needed}; name the picture, or leave it out.")
    if init_image is None:
        return None
    picture = examined(init_image, "init-image")
    stencil = None if mask is None else examined(mask, "mask")
    if stencil is not None and abs(stencil.width * picture.height / (stencil.height * picture.width) - 1) > SHAPE_TOLERANCE:
        raise UsageError(
            f"--mask {stencil.name} is {stencil.width}×{stencil.height} and {picture.name} is {picture.width}×{picture.height}; give a mask of "
            "the picture's size, or of its shape."
        )
    if strength is None:
        strength = 0.75 if mask is None else 1.0
    return Edit(
        init_image=picture,
        strength=strength,
        resize="crop" if resize is None else resize,
        mask=stencil,
        mask_blur=0.0 if mask_blur is None else mask_blur,
    )


def resolved_upscale(factor: float | None, mode: str | None, steps: int | None, strength: float | None, first_steps: int) -> Upscale | None:
    """Fill in what is left open of a second round: mode "pixel", as many steps as the first, strength 0.35.

    Raises:
        UsageError: its options without `factor`.
    """
    for option, value in (("upscale-mode", mode), ("upscale-steps", steps), ("upscale-strength", strength)):
        if value is not None and factor is None:
            raise UsageError(f"--{option} needs --upscale; say how many times as large, or leave it out.")
    if factor is None:
        return None
    return Upscale(
        factor=factor,
        mode="pixel" if mode is None else mode,
        steps=first_steps if steps is None else steps,
        strength=0.35 if strength is None else strength,
    )


def edit_from(stored: Mapping[str, Any]) -> Edit:
    """An edit from its JSON; errors as of `inputs.picture_from`."""
    mask = stored["mask"]
    return Edit(
        init_image=picture_from(stored["init_image"]),
        strength=float(stored["strength"]),
        resize=str(stored["resize"]),
        mask=None if mask is None else picture_from(mask),
        mask_blur=float(stored["mask_blur"]),
    )


def upscale_from(stored: Mapping[str, Any]) -> Upscale:
    """An `Upscale` from its JSON; errors as of `inputs.picture_from`."""
    return Upscale(factor=float(stored["factor"]), mode=str(stored["mode"]), steps=int(stored["steps"]), strength=float(stored["strength"]))
