"""`tu-diffuse models`: the models that are there, and what each of them is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .info import lines_of
from .options import EXIT_CODES, Debug, Json

app = typer.Typer(
    help="Models: what each of them is. Models are never changed.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A model folder. [default: the embedded model]")]


@app.command(epilog=EXIT_CODES)
def info(model: Name = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what a model is: family, licence, parts, parameters, experts with their noise levels, size, hash. No weights are loaded.

    Examples:

      tu-diffuse models info

      tu-diffuse models info models/my-sdxl --json

    With --json one line: kind, name, hash, licence, family, prediction, size_multiple, parameters, megabytes, defaults, experts and parts.
    """
    del debug  # read in main.py
    from ..pipeline.describe import describe
    from ..pipeline.folder import open_folder

    facts = describe(open_folder(model))
    if as_json:
        print(json.dumps(facts))
    else:
        for line in lines_of(facts):
            print(line)
