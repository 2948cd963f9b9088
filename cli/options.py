"""Options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = (
    "Exit codes: 0 done, 1 something could not be made or differs, 2 usage, 3 refused as unsafe, 4 invalid model or data, "
    "74 output could not be written, 130 interrupted, 143 terminated."
)

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Folder in diffusers' layout, single .safetensors file, or OWNER/NAME[@REVISION] of the Hugging Face hub. [default: the embedded model]",
    ),
]
PredictionType = Annotated[
    str | None,
    typer.Option("--prediction-type", help="What a single file's U-Net predicts: epsilon or v. [default: what the file says, else epsilon]"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps; auto takes the fastest there is.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16; auto is float32 on a CPU and float16 elsewhere.")]
Attention = Annotated[str, typer.Option("--attention", help="Attention kernel: auto, flash, efficient, cudnn or math. See tu-diffuse doctor.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT][@EXPERT]",
        help="LoRA of diffusers, peft or kohya's programs, as in style.safetensors:0.8; the weight is 1 when left out; may be repeated.",
    ),
]
Embeddings = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding",
        metavar="FILE[=WORD]",
        help="Textual-inversion embedding, used where its word stands in a prompt; the word is what the file names, else its name; may be repeated.",
    ),
]
Quantize = Annotated[
    str, typer.Option("--quantize", help="int8: linear layers of text encoders and experts as 8-bit integers, by torchao, in less memory; none.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

InitImage = Annotated[
    Path | None, typer.Option("--init-image", metavar="FILE", help="Begin with this picture (PNG, JPEG, WebP). See docs/editing.md.")
]
Strength = Annotated[float | None, typer.Option("--strength", help="0..1: share of the steps that are taken on it. [default: 0.75, with --mask 1]")]
Resize = Annotated[str | None, typer.Option("--resize", help="How it is brought to --width and --height: crop or stretch. [default: crop]")]
Mask = Annotated[Path | None, typer.Option("--mask", metavar="FILE", help="Repaint --init-image where this is white, keep it where it is black.")]
MaskBlur = Annotated[float | None, typer.Option("--mask-blur", help="Pixels over which the repainted part fades out inside the mask. [default: 0]")]
Upscale = Annotated[float | None, typer.Option("--upscale", metavar="FACTOR", help="Draw, enlarge by this factor, and draw on.")]
UpscaleMode = Annotated[str | None, typer.Option("--upscale-mode", help="What is enlarged: latent or pixel. [default: pixel]")]
UpscaleSteps = Annotated[int | None, typer.Option("--upscale-steps", help="Steps of the second round. [default: as many as --steps]")]
UpscaleStrength = Annotated[float | None, typer.Option("--upscale-strength", help="0..1: share of them that are taken. [default: 0.35]")]
ControlKind = Annotated[str | None, typer.Option("--control", help="What to make of --control-image: none (it is a map) or canny. [default: none]")]
ControlImage = Annotated[Path | None, typer.Option("--control-image", metavar="FILE", help="Steer the drawing by this, through --control-model.")]
ControlModel = Annotated[Path | None, typer.Option("--control-model", metavar="FOLDER", help="ControlNet, as diffusers' save_pretrained writes it.")]
ControlScale = Annotated[float | None, typer.Option("--control-scale", help="How strongly it steers. [default: 1]")]
ControlStart = Annotated[float | None, typer.Option("--control-start", help="0..1: share of the steps after which it begins. [default: 0]")]
ControlEnd = Annotated[float | None, typer.Option("--control-end", help="0..1: share of the steps after which it ends. [default: 1]")]
Tile = Annotated[str | None, typer.Option("--tile", metavar="x|y|xy", help="Make the picture meet itself when laid side by side, along these axes.")]
