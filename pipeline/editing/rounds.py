"""Where a run begins when it does not begin from noise alone, and what it must not touch.

A picture to begin with becomes latents under as much noise as its strength says (SDEdit: Meng et al. 2021, arXiv 2108.01073). Where a mask keeps it,
every evaluation of an ordinary network sees it at the noise level of that evaluation and gives it back as it is (RePaint: Lugmayr et al. 2022, arXiv
2201.09865, equation 8, without resampling); an inpainting network sees mask and masked picture beside the latents instead. In the end the
kept pixels are those of the picture itself.

Random numbers come from each picture's own stream in diffusers' order: the draw from the VAE's Gaussian (none where it has no
variance), the noise, the masked picture's draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Generator, Tensor

from ...contracts import Conditioning
from ...offload import device_of
from ...schedulers.schedules import SigmaSchedule, make_schedule
from ...schedulers.step import BoundDenoiser
from ...vae.codec import LatentCodec, sample_posterior, to_uint8
from ..model.folder import ModelFolder
from ..request import Request, Round
from ..seeds import draw
from .control import hint_of
from .edits import Edit
from .inputs import fitted, greys_of, pixels_of


@dataclass(frozen=True, eq=False)
class Kept:
    """What must come out of a run as it went in.

    Attributes:
        latents: (rows, channels, h, w) of the pictures.
        noise: of the same shape, the noise that they are under.
        repaint: (rows, 1, h, w), 1 where the run decides, 0 where the pictures do.
    """

    latents: Tensor
    noise: Tensor
    repaint: Tensor


@dataclass(frozen=True, eq=False)
class Start:
    """Where a round begins; all float32, on one device.

    Attributes:
        latents: (rows, channels, h, w) at the noise level of its first step.
        kept: what an ordinary network must leave alone, or None.
        shown: see `Conditioning.shown`; what an inpainting network sees, or None.
        fallbacks: what had to be done differently.
    """

    latents: Tensor
    kept: Kept | None = None
    shown: Tensor | None = None
    fallbacks: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "Start":
        """The same on another device."""
        kept = None if self.kept is None else Kept(*(part.to(device) for part in (self.kept.latents, self.kept.noise, self.kept.repaint)))
        return replace(self, latents=self.latents.to(device), kept=kept, shown=None if self.shown is None else self.shown.to(device))

    def rows(self, cut: slice | list[int]) -> "Start":
        """Some of its rows."""
        kept = None if self.kept is None else Kept(self.kept.latents[cut], self.kept.noise[cut], self.kept.repaint[cut])
        return replace(self, latents=self.latents[cut], kept=kept, shown=None if self.shown is None else self.shown[cut])


def round_schedule(folder: ModelFolder, request: Request, part: Round) -> SigmaSchedule:
    """The noise levels of a round."""
    return make_schedule(folder.noise, request.sampler, part.steps, spacing=request.schedule, sigmas=request.sigmas)


def round_shape(folder: ModelFolder, part: Round) -> tuple[int, int, int]:
    """(channels, h, w) of a round's latents."""
    return folder.channels, part.height // folder.factor, part.width // folder.factor


def begin(
    folder: ModelFolder,
    codec: Callable[[], LatentCodec],
    device: torch.device,
    requests: Sequence[Request],
    part: Round,
    schedule: SigmaSchedule,
    generators: Sequence[Generator],
    drawn: Tensor | None,
) -> Start:
    """Where a round begins: in noise alone, in pictures under noise, or in smaller drawings of themselves.

    Args:
        folder: the model.
        codec: gives its codec; not called for noise alone.
        device: where the round is computed.
        requests: one a row; alike in all but seeds, prompts, and which pictures they begin with.
        part: the round.
        schedule: its noise levels.
        generators: one a row.
        drawn: (rows, channels, h, w), what the round before it came to; None in the first.

    Raises:
        UsageError: a picture is gone, or is not what it was.
        RenderError: the VAE gives values that are not finite.
    """
    if drawn is not None:
        return _from_smaller(folder, codec(), requests[0], drawn, part, schedule, generators)
    edits = [request.edit for request in requests if request.edit is not None]
    if edits:
        return _from_pictures(folder, codec(), edits, part, schedule, generators)
    return Start(draw(generators, round_shape(folder, part)).to(device) * schedule.initial_scale)


def _from_pictures(
    folder: ModelFolder, codec: LatentCodec, edits: Sequence[Edit], part: Round, schedule: SigmaSchedule, generators: Sequence[Generator]
) -> Start:
    """Begin from pictures, with or without masks."""
    pictures = [fitted(pixels_of(edit.init_image), part.width, part.height, edit.resize) for edit in edits]
    masks = [_mask_of(edit, part) for edit in edits if edit.mask is not None]
    from_all_noise = bool(masks) and part.first == 0
    shape, device = round_shape(folder, part), _device(codec)
    if folder.inpaints and from_all_noise:
        latents, fallbacks = torch.zeros(len(edits), *shape, device=device), ()  # that no draw is spent on
    else:
        latents, fallbacks = encoded(codec, pictures, generators)
    noise = draw(generators, shape).to(device)
    begun = noise * schedule.initial_scale if from_all_noise else latents + noise * float(schedule.sigmas[part.first])
    if not masks:
        return Start(begun, fallbacks=fallbacks)
    if not folder.inpaints:
        touched = torch.from_numpy(np.stack(masks) > 0)[:, None].float()
        return Start(begun, Kept(latents, noise, F.max_pool2d(touched, folder.factor).to(device)), fallbacks=fallbacks)
    white = np.stack(masks) >= 128
    blanked = [np.where(part_white[:, :, None], 127.5, picture) for part_white, picture in zip(white, pictures, strict=True)]
    masked, more = encoded(codec, blanked, generators)
    cells = F.interpolate(torch.from_numpy(white)[:, None].float(), size=shape[1:], mode="nearest").to(device)
    return Start(begun, shown=torch.cat([cells, masked], dim=1), fallbacks=(*fallbacks, *more))


def encoded(codec: LatentCodec, pictures: Sequence[NDArray[Any]], generators: Sequence[Generator]) -> tuple[Tensor, tuple[str, ...]]:
    """Latents (rows, channels, h, w) of pictures (height, width, 3) in 0..255, one draw of each from its own stream; and `Start.fallbacks`.

    Each is encoded alone, equal ones once, so that it does not depend on its company.
    """
    gaussians: dict[bytes, tuple[Tensor, Tensor]] = {}
    rows: list[Tensor] = []
    fallbacks: list[str] = []
    for picture, generator in zip(pictures, generators, strict=True):
        content = picture.tobytes()
        if content not in gaussians:
            pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
            mean, std, had_to = codec.posterior(pixels.to(_device(codec)))
            gaussians[content] = mean, std
            fallbacks += had_to[0]
        rows.append(sample_posterior(*gaussians[content], [generator]) if codec.has_variance else gaussians[content][0])
    return torch.cat(rows), tuple(fallbacks)


def keeping(denoise: BoundDenoiser, kept: Kept | None, start: float) -> BoundDenoiser:
    """Wrap a denoiser so that what is kept comes out of the run as it went in, whatever the sampler.

    Below the noise level that the run starts from, the network sees the kept parts under their own noise of that level; what it says of
    them is replaced by what they are. Samplers compute element by element, so the repainted parts come out as if the sampler's own
    latents had been replaced after each step, which is what diffusers does.

    Args:
        denoise: guided, with its conditioning.
        kept: what is kept; None returns `denoise` as it is.
        start: sigma of the run's first evaluation, which sees what the run starts from.
    """
    if kept is None:
        return denoise

    def kept_denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x).view(-1, 1, 1, 1)
        known = torch.where(level < start, kept.latents + kept.noise * level, x)
        x0 = denoise(torch.where(kept.repaint > 0, x, known), sigma)
        return torch.where(kept.repaint > 0, x0, kept.latents)

    return kept_denoise


def showing(conditioning: Conditioning, start: Start, requests: Sequence[Request], part: Round) -> Conditioning:
    """A conditioning that shows the networks their pictures: an inpainting U-Net what is masked, a ControlNet what it reads.

    Raises:
        UsageError: a picture is gone, or is not what it was.
    """
    read = [(request.control, "crop" if request.edit is None else request.edit.resize) for request in requests]
    made: dict[str, Tensor] = {}
    for control, resize in read:
        if control is not None and control.image.sha256 not in made:
            made[control.image.sha256] = hint_of(control, part.width, part.height, resize)
    hints = [made[control.image.sha256].to(conditioning.tokens.device) for control, _ in read if control is not None]
    if start.shown is None and not hints:
        return conditioning
    return replace(conditioning, shown=start.shown, hint=torch.cat(hints) if hints else None)


def composited(pixels: Tensor, edit: Edit | None, part: Round) -> Tensor:
    """The finished picture: where its mask is black, the pixels of the picture that it began with; where it is grey, a mixture.

    Args:
        pixels: (height, width, 3) uint8, on the CPU.
        edit: of this picture.
        part: the last round.
    """
    if edit is None or edit.mask is None:
        return pixels
    old = torch.from_numpy(fitted(pixels_of(edit.init_image), part.width, part.height, edit.resize).copy())
    weight = torch.from_numpy(_feathered(_mask_of(edit, part), edit.mask_blur))[:, :, None]
    mixed = (old + (pixels.float() - old) * weight).round().to(torch.uint8)
    return torch.where(weight == 0, old, mixed)


def _from_smaller(
    folder: ModelFolder, codec: LatentCodec, request: Request, latents: Tensor, part: Round, schedule: SigmaSchedule, generators: Sequence[Generator]
) -> Start:
    """Begin the second round from the enlarged drawing of the first."""
    assert request.upscale is not None
    shape, fallbacks = round_shape(folder, part), tuple[str, ...]()
    if request.upscale.mode == "latent":
        large = _resized_latents(latents, shape[1], shape[2], request.tile)
    else:
        drawn = [to_uint8(codec.decode(row[None]).pixels)[0].cpu().numpy() for row in latents]
        large, fallbacks = encoded(codec, [_resized_pixels(picture, part.width, part.height, request.tile) for picture in drawn], generators)
    return Start(large + draw(generators, shape).to(large.device) * float(schedule.sigmas[part.first]), fallbacks=fallbacks)


def _resized_latents(latents: Tensor, height: int, width: int, tile: str | None) -> Tensor:
    """Bilinear; across the edge where the picture meets itself there."""
    ys, xs = _copies(tile)
    large = F.interpolate(latents.repeat(1, 1, ys, xs), size=(height * ys, width * xs), mode="bilinear", align_corners=False)
    top, left = height * (ys // 2), width * (xs // 2)
    return large[:, :, top : top + height, left : left + width]


def _resized_pixels(picture: NDArray[np.uint8], width: int, height: int, tile: str | None) -> NDArray[np.uint8]:
    """Lanczos; across the edge where the picture meets itself there."""
    ys, xs = _copies(tile)
    large = fitted(np.tile(picture, (ys, xs, 1)), width * xs, height * ys, "stretch")
    top, left = height * (ys // 2), width * (xs // 2)
    return large[top : top + height, left : left + width]


def _copies(tile: str | None) -> tuple[int, int]:
    """How many copies below and beside each other make the neighbours of a picture's edge its own other side."""
    return (3 if tile in ("y", "xy") else 1), (3 if tile in ("x", "xy") else 1)


def _mask_of(edit: Edit, part: Round) -> NDArray[np.uint8]:
    """The mask (height, width) of a round, after what was done to its picture."""
    assert edit.mask is not None
    picture, mask = edit.init_image, greys_of(edit.mask)
    if (edit.mask.width, edit.mask.height) != (picture.width, picture.height):
        mask = np.asarray(Image.fromarray(mask).resize((picture.width, picture.height), Image.Resampling.BILINEAR))
    return fitted(mask, part.width, part.height, edit.resize)


def _feathered(mask: NDArray[np.uint8], blur: float) -> NDArray[np.float32]:
    """Weights 0..1 of the repainted picture: 0 wherever the mask is 0, and rising from its edge inwards over about `blur` pixels."""
    weight = mask.astype(np.float32) / np.float32(255)
    if blur == 0:
        return weight
    blurred = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(blur))).astype(np.float32) / np.float32(255)
    return np.minimum(weight, np.clip(2 * blurred - 1, 0, 1))


def _device(codec: LatentCodec) -> torch.device:
    return device_of(codec.vae)
