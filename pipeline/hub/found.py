"""What a person named as a model: a path, or a name of the hub."""

from pathlib import Path

from ...errors import UsageError
from .models import cached, hub_name


def found(path: Path, *, fetch: bool = True, variant: str | None = None) -> Path:
    """What a person named: a file or folder that is there as it is, else a hub's model from the cache, or from the hub.

    Args:
        path: as it was given.
        fetch: whether a model that is not in the cache is fetched.
        variant: of its weights then, see `choice.choose`.

    Returns:
        A path in the cache, or `path` itself, whether it is there or not.

    Raises:
        UsageError: it looks like a hub's name but nothing may be fetched.
        TuDiffuseError: see `pull.pull`.
    """
    name = None if path.exists() else hub_name(path.as_posix())
    if name is None:
        return path
    there = cached(name)
    if there is not None:
        return there
    if not fetch:
        raise UsageError(f"{str(name)!r} is neither here nor in the hub's cache; give a folder, or fetch it with tu-diffuse models pull {name}.")
    if Path(path.parts[0]).is_dir():
        raise UsageError(f"{str(name)!r} is not there, though {path.parts[0]}/ is; correct the path, or fetch it from the hub: models pull {name}.")
    from .pull import pull  # costs half a second of imports

    return pull(name, variant)
