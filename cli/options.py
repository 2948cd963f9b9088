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
        help="Model folder in diffusers' layout, or OWNER/NAME[@REVISION] of the Hugging Face hub. [default: the embedded model]",
    ),
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
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
