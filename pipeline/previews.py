"""Looking into a run: a preview file that follows it, and a strip that shows every step afterwards."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..vae.codec import LatentCodec, to_uint8
from .output import publish, replace
from .text_to_image import Progress

_TILE, _CAPTION, _COLUMNS = 128, 30, 10


class LivePreview:
    """A picture file beside the output that shows the predictions of the latest step, side by side, until the run is over."""

    def __init__(self, codec: LatentCodec, folder: Path, name: str, say: Callable[[str], None]) -> None:
        """Prepare; nothing is written before the first step.

        Args:
            codec: decodes the predictions.
            folder: where the output goes.
            name: file name of the first picture of the batch.
            say: told the name of the preview once it exists.
        """
        self._codec, self._folder, self._say = codec, folder, say
        self._name = f"{Path(name).stem}.preview.png"
        self._path: Path | None = None

    def add(self, event: Progress) -> None:
        """Replace the preview by what this step predicts."""
        pictures = [decode_picture(self._codec, x0[None]) for x0 in event.x0]
        joined = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
        for i, picture in enumerate(pictures):
            joined.paste(picture, (i * picture.width, 0))
        if self._path is None:
            self._path = publish(png(joined), self._folder, self._name)
            self._say(f"preview {self._path}")
        else:
            replace(png(joined), self._path)

    def remove(self) -> None:
        """Delete the preview: the pictures themselves are there now, or will not come."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class StepsStrip:
    """The predictions of every step of a batch, kept as latents until they are drawn."""

    def __init__(self) -> None:
        self._steps: list[Progress] = []

    def add(self, event: Progress) -> None:
        """Keep one step."""
        self._steps.append(event)

    def render(self, codec: LatentCodec, index: int) -> bytes:
        """The strip of one picture as a PNG file: what was predicted in each step, and under it step, expert and sigma.

        Args:
            codec: decodes the predictions.
            index: the picture's place in the batch.
        """
        columns = min(len(self._steps), _COLUMNS)
        rows = -(-len(self._steps) // columns)
        strip = Image.new("RGB", (columns * _TILE, rows * (_TILE + _CAPTION)), "white")
        pen, font = ImageDraw.Draw(strip), ImageFont.load_default(10)
        colours = dict(zip(dict.fromkeys(step.expert for step in self._steps), ("#b03020", "#1860a0", "#2a7a3a", "#7a4a9a"), strict=False))
        for i, step in enumerate(self._steps):
            x, y = i % columns * _TILE, i // columns * (_TILE + _CAPTION)
            picture = decode_picture(codec, step.x0[index : index + 1])
            picture.thumbnail((_TILE, _TILE))
            strip.paste(picture, (x + (_TILE - picture.width) // 2, y))
            colour = colours.get(step.expert, "black")
            pen.rectangle((x, y + _TILE, x + _TILE - 1, y + _TILE + 2), fill=colour)
            pen.text((x + 3, y + _TILE + 4), f"{step.index + 1}  {step.expert[:16]}", fill=colour, font=font)
            pen.text((x + 3, y + _TILE + 16), f"sigma {step.sigma:.3g}", fill="black", font=font)
        return png(strip)


def decode_picture(codec: LatentCodec, latents: Tensor) -> Image.Image:
    """(1, channels, h, w) latents in the denoiser's scale to an RGB picture."""
    return to_image(to_uint8(codec.decode(latents).pixels)[0].cpu())


def to_image(pixels: Tensor) -> Image.Image:
    """(height, width, 3) uint8 on the CPU to an RGB picture."""
    return Image.fromarray(np.asarray(pixels.numpy()))


def png(image: Image.Image) -> bytes:
    """A PNG file in memory, without settings."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
