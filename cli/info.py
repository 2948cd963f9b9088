"""`tu-diffuse info`: what a picture was made with, or what a model folder holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..single_file import PICKLE_SUFFIXES, SUFFIX
from .options import Debug, Json, PredictionType

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PICTURE|MODEL]",
            help="A picture, or a model: folder, single file, LoRA, or OWNER/NAME in the hub's cache. [default: the embedded model]",
        ),
    ] = None,
    prediction_type: PredictionType = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the settings that a picture carries, or what a model folder holds. No weights are loaded.

    Examples:

      tu-diffuse info a-red-apple-7.png

      tu-diffuse info models/my-sdxl --json

      tu-diffuse info sd15.safetensors

    With --json one line: for a picture the settings it carries, for a model what tu-diffuse models info prints.
    """
    del debug  # read in main.py
    from ..pipeline.hub.found import found

    if path is not None and path.suffix not in PICTURES:
        path = found(path, fetch=False)
    if path is not None and not path.exists():
        raise UsageError(f"{str(path)!r} is not there; name a picture or a model.")
    if path is not None and path.is_file() and path.suffix not in (SUFFIX, *PICKLE_SUFFIXES):
        if prediction_type is not None:
            raise UsageError("--prediction-type is for single-file checkpoints; leave it out for a picture.")
        from ..pipeline.metadata import read_metadata

        facts = read_metadata(path)
    else:
        facts = facts_of(path, prediction_type)
    if as_json:
        print(json.dumps(facts))
    else:
        for line in lines_of(facts):
            print(line)


def facts_of(path: Path | None, prediction_type: str | None, variant: str | None = None) -> dict[str, Any]:
    """What a model is, or a LoRA file, or a folder of one network."""
    from ..pipeline.model.describe import describe, describe_weights, is_weights_alone
    from ..pipeline.model.folder import open_folder

    if path is not None and is_weights_alone(path):
        if prediction_type is not None:
            raise UsageError(f"--prediction-type is for single-file checkpoints, and {path.name!r} is none; leave it out.")
        if variant is not None:
            raise UsageError(f"--variant is for model folders, and {path.name!r} is none; leave it out.")
        return describe_weights(path)
    return describe(open_folder(path, prediction_type, variant))


def lines_of(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Facts as indented text for people; control characters are shown, not sent to the terminal."""
    lines: list[str] = []
    for key, value in facts.items():
        match value:
            case dict():
                lines += [f"{indent}{_text(key)}:", *lines_of(value, indent + "  ")]
            case [dict(), *_] if all(isinstance(entry, dict) for entry in value):
                lines.append(f"{indent}{_text(key)}:")
                for entry in value:
                    lines.append(f"{indent}  - " + ", ".join(f"{_text(k)} {_text(v)}" for k, v in entry.items()))
            case _:
                lines.append(f"{indent}{_text(key)}: {_text(value)}")
    return lines


def _text(value: object) -> str:
    match value:
        case float():
            return f"{value:.6g}"
        case str():
            return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in value)
        case None:
            return "-"
        case list():
            return ", ".join(_text(entry) for entry in value) if value else "-"
        case _:
            return str(value)
