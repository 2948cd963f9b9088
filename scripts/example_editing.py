"""The pictures of docs/editing.md: what the embedded model makes of a picture, with the commands that a user would type.

    python scripts/example_editing.py --out build/editing

Writes the pictures and `editing.png`, all of them in a row, and prints how large the step around the edge of the tiled one is.
"""

import argparse
import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tu_diffuse.cli.main import run

SIDE = 256


def main() -> None:
    """Draw everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder, which is made")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    right = Image.new("L", (128, 128))
    ImageDraw.Draw(right).rectangle((64, 0, 127, 127), fill=255)
    right.save(out / "right.png")

    with contextlib.chdir(out):
        _generate("first", "a red apple to the left of a blue star", "--seed", "3")
        _generate("img2img", "a green heart to the left of a yellow star", "--init-image", "first.png", "--strength", "0.7", "--seed", "3")
        _generate("inpainted", "a red apple to the left of a yellow star", "--init-image", "first.png", "--mask", "right.png", "--seed", "4")
        _generate("upscaled", "a red apple to the left of a blue star", "--upscale", "2", "--upscale-strength", "0.3", "--seed", "3")
        _generate("tiled", "a red apple on a beach", "--tile", "xy", "--seed", "5")
        tiled = np.asarray(Image.open("tiled.png"))
        Image.fromarray(np.tile(tiled, (2, 2, 1))).save("tiled-2x2.png")
        steps = [np.abs(tiled.astype(float) - np.roll(tiled, 1, axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)]
        for name, one in zip(("rows", "columns"), steps, strict=True):
            print(f"tiled.png, mean difference of neighbouring {name}: {one[0]:.2f} around the edge, up to {one[1:].max():.2f} inside")
        names = ("first", "img2img", "inpainted", "upscaled", "tiled-2x2")
        row = Image.new("RGB", (len(names) * (SIDE + 4) - 4, SIDE), "white")
        for i, name in enumerate(names):
            row.paste(Image.open(f"{name}.png").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i * (SIDE + 4), 0))
        row.save("editing.png")


def _generate(name: str, *arguments: str) -> None:
    if run(["generate", *arguments, "--out", f"{name}.png"]):
        raise SystemExit(f"{name} could not be drawn")


if __name__ == "__main__":
    main()
