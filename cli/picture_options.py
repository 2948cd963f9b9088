"""Options that `generate` and `batch` share about how a picture is made, in groups; `options.grouped` makes them options of a command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class EditOptions:
    """A picture to begin with, a second round on the enlarged drawing, and tiling; as `pipeline.resolve.resolve` takes them."""

    init_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Begin with this picture (PNG, JPEG, WebP). See docs/editing.md.")] = None
    strength: Annotated[float | None, typer.Option(help="0..1: share of the steps that are taken on it. [default: 0.75, with --mask 1]")] = None
    resize: Annotated[str | None, typer.Option(help="How it is brought to --width and --height: crop or stretch. [default: crop]")] = None
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="Repaint --init-image where this is white, keep it where it is black.")] = None
    mask_blur: Annotated[float | None, typer.Option(help="Pixels over which the repainted part fades out inside the mask. [default: 0]")] = None
    upscale: Annotated[float | None, typer.Option(metavar="FACTOR", help="Draw, enlarge by this factor, and draw on.")] = None
    upscale_mode: Annotated[str | None, typer.Option(help="What is enlarged: latent or pixel. [default: pixel]")] = None
    upscale_steps: Annotated[int | None, typer.Option(help="Steps of the second round. [default: as many as --steps]")] = None
    upscale_strength: Annotated[float | None, typer.Option(help="0..1: share of them that are taken. [default: 0.35]")] = None
    tile: Annotated[str | None, typer.Option(metavar="x|y|xy", help="Make the picture meet itself when laid side by side, along these axes.")] = None


@dataclass(frozen=True)
class ControlOptions:
    """What steers the drawing through a ControlNet; as `pipeline.resolve.resolve` takes it."""

    control: Annotated[str | None, typer.Option(help="What to make of --control-image: none (it is a map), canny, depth. [default: none]")] = None
    control_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Steer the drawing by this, through --control-model.")] = None
    control_model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="ControlNet, as diffusers' save_pretrained writes it.")] = None
    control_scale: Annotated[float | None, typer.Option(help="How strongly it steers. [default: 1]")] = None
    control_start: Annotated[float | None, typer.Option(help="0..1: share of the steps after which it begins. [default: 0]")] = None
    control_end: Annotated[float | None, typer.Option(help="0..1: share of the steps after which it ends. [default: 1]")] = None
    control_depth_model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What estimates depth for --control depth: DPT or Depth Anything.")
    ] = None
