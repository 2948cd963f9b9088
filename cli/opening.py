"""Opening a model for a command that writes another one from it."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..pipeline.model.folder import ModelFolder


def open_unpacked(path: Path | None, prediction_type: str | None = None) -> "ModelFolder":
    """`open_folder`; a single file is unpacked into the user's cache first, which is said on standard error."""
    from ..pipeline.model.convert import unpacked
    from ..pipeline.model.folder import open_folder

    model = open_folder(path, prediction_type)
    folder = unpacked(model)
    if folder is not model:
        typer.echo(f"{model.name} predicts {model.noise.prediction_type}; it is used as the folder {folder.path}", err=True)
    return folder
