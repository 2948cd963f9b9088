"""Files of a folder of pictures, written whole or not at all; what a killed process left half written is known by its name."""

from functools import partial
from pathlib import Path

from ..pipeline import output

_PREFIX = ".batch-"

publish = partial(output.publish, prefix=_PREFIX)
replace = partial(output.replace, prefix=_PREFIX)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written; only for a process that is alone in the folder."""
    for path in folder.rglob(f"{_PREFIX}*"):
        path.unlink()
