"""Options that several commands share, each defined once, and groups of them.

A command takes a group as one parameter whose type is a frozen dataclass; `grouped` shows Typer each field as an option in that place.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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
Variant = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="Of a model folder, take these weights where a part has them, as in fp16. [default: plain ones]"),
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
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="Leave weights in their files, or with a GPU in main memory, and move in those of each layer as it computes: less memory, more time.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer is to see it: where it takes a dataclass, it has the dataclass's fields as options, with their types and defaults."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            types = get_type_hints(groups[parameter.name], include_extras=True)
            members = [(one.name, one.default, types[one.name]) for one in fields(groups[parameter.name])]
        else:
            members = [(parameter.name, parameter.default, hints[parameter.name])]
        options += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint) for name, default, hint in members]

    @wraps(command)
    def with_groups(**given: Any) -> None:
        made = {name: group(**{one.name: given.pop(one.name) for one in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    with_groups.__signature__ = inspect.Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    return with_groups
