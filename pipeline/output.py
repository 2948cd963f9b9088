"""Picture files: names that are safe on every system, written whole or not at all, and never over another file."""

import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from ..errors import OutputError, UsageError
from .limits import SUFFIXES

MAX_NAME_BYTES = 180
TEMPORARY = ".tu-diffuse-"
_SUFFIX_OF = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_ROOM = 20  # for "-12345", "-steps", ".preview" and the suffix
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}  # by Windows, in any folder
_TEMPLATE_FIELDS = {"prompt", "seed", "number"}


@dataclass(frozen=True)
class Target:
    """Where pictures go: one file, or a folder in which names are made from a template."""

    folder: Path
    file_name: str | None
    template: str
    picture_format: str

    def name(self, prompt: str, seed: int, number: int) -> str:
        """The wanted file name of one picture (number counts from 1 in a run); `publish` makes it unique."""
        if self.file_name is not None:
            return self.file_name
        return picture_name(self.template, self.picture_format, prompt, seed, str(number))


def picture_name(template: str, picture_format: str, prompt: str, seed: int, number: str) -> str:
    """The file name of a picture: `template` filled in, at most MAX_NAME_BYTES - 20 bytes, usable on every system.

    Args:
        template: checked, with the fields {prompt}, {seed} and {number}.
        picture_format: "png", "jpeg" or "webp".
        prompt: becomes its `slug`.
        seed: of the picture.
        number: its place in the run.
    """
    stem = shorten(template.format(prompt=slug(prompt), seed=seed, number=number), MAX_NAME_BYTES - _ROOM)
    return (f"{stem}_" if stem.partition(".")[0].upper() in _RESERVED else stem) + _SUFFIX_OF[picture_format]


def plan_target(out: Path | None, name: str | None, picture_format: str | None, pictures: int) -> Target:
    """Decide where the pictures of a run go, and try it before any time is spent on drawing.

    Args:
        out: None is the current folder. An existing folder, a name that ends in a slash or a name without a suffix is a folder (made when
            missing); a name that ends in .png, .jpg, .jpeg or .webp is a file.
        name: template of file names with the fields {prompt}, {seed} and {number}; None is "{prompt}-{seed}".
        picture_format: "png", "jpeg" or "webp"; None takes it from the suffix of `out`, else PNG.
        pictures: how many pictures the run makes.

    Raises:
        UsageError: the three arguments contradict each other.
        OutputError: the folder cannot be written, or the file exists.
    """
    if picture_format is not None and picture_format not in _SUFFIX_OF:
        raise UsageError(f"--format {picture_format!r} is not known; use one of {', '.join(_SUFFIX_OF)}.")
    path = Path() if out is None else out
    is_folder = path.is_dir() or str(out).endswith(("/", os.sep)) or not path.suffix
    template = "{prompt}-{seed}" if name is None else checked_template("--name", name)
    if is_folder:
        target = Target(path, None, template, "png" if picture_format is None else picture_format)
    else:
        suffix_format = SUFFIXES.get(path.suffix.lower())
        if suffix_format is None:
            raise UsageError(f"--out {path.name!r} ends in {path.suffix!r}; end a file in {', '.join(SUFFIXES)}, or a folder in a slash.")
        if picture_format not in (None, suffix_format):
            raise UsageError(f"--out {path.name!r} and --format {picture_format} contradict each other; leave one of them out.")
        if pictures != 1:
            raise UsageError(f"--out {path.name!r} is one file but {pictures} pictures are asked for; give a folder.")
        if name is not None:
            raise UsageError(f"--out {path.name!r} is a file and --name {name!r} names files in a folder; leave one of them out.")
        target = Target(path.parent, path.name, template, suffix_format)
    try_folder(target.folder)
    if target.file_name is not None and os.path.lexists(path):
        raise OutputError(f"{path.name!r} exists and is never overwritten; give another --out, or remove it first.")
    return target


def publish(data: bytes, folder: Path, wanted: str, prefix: str = TEMPORARY) -> Path:
    """Write a whole file under a name that was free, "name-2", "name-3" and so on when it was not.

    The bytes go to a temporary file, are synced to disk, and get their final name in one step that fails when the name is taken, so several
    processes can write into one folder and no file is ever seen half written or replaced. A name may begin with folders that are there: "a/b.png".

    Args:
        data: of the file.
        folder: that it goes to.
        wanted: its name, if that is free.
        prefix: of the temporary file, which only a killed process leaves behind.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=prefix, dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            for candidate in candidates(wanted):
                with suppress(FileExistsError):
                    _give_name(temporary, folder / candidate)
                    _sync((folder / candidate).parent)
                    return folder / candidate
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise _unwritable(folder, error) from None
    raise AssertionError("candidates never end")


def replace(data: bytes, path: Path, prefix: str = TEMPORARY) -> None:
    """Write a file whole, in the place of its earlier version: for files that only this run writes.

    Args:
        data: of the file.
        path: of the file.
        prefix: of the temporary file, which only a killed process leaves behind.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def checked_template(what: str, name: str) -> str:
    """Return a template of file names as it is.

    Raises:
        UsageError: it has other fields than {prompt}, {seed} and {number}, or is no file name on every system.
    """
    try:
        fields = [(field, spec, conversion) for _, field, spec, conversion in string.Formatter().parse(name) if field is not None]
    except ValueError:
        fields = [(name, "", None)]
    if any(field not in _TEMPLATE_FIELDS or spec or conversion is not None for field, spec, conversion in fields):
        raise UsageError(f"{what} {name!r} has a field that is not known; use {{prompt}}, {{seed}} and {{number}} only.")
    plain = name.format(prompt="", seed="", number="")
    if not name or re.search(r'[<>:"/\\|?*\x00-\x1f\x7f]', plain) or name.startswith((".", "-")) or name.endswith((".", " ")):
        raise UsageError(
            f"{what} {name!r} is no file name on every system; use letters, digits, dashes, and the fields {{prompt}}, {{seed}}, {{number}}."
        )
    return name


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case letters and digits of any script joined by dashes, at most 60 bytes, "picture" when none."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    short = shorten(unicodedata.normalize("NFC", "-".join(words)), 60).strip("-")
    return short if short else "picture"


def shorten(text: str, limit: int) -> str:
    """The longest start of `text` that takes at most `limit` bytes in UTF-8."""
    return text.encode("utf-8", "ignore")[:limit].decode("utf-8", "ignore")


def candidates(wanted: str) -> Iterator[str]:
    """The names that `publish` tries, in order, without end: "a.png", "a-2.png", "a-3.png" and so on."""
    yield wanted
    path, number = PurePosixPath(wanted), 1
    while True:
        number += 1
        yield str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _give_name(temporary: str, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: look and rename, one process at a time
        with FileLock(final.parent / ".tu-diffuse.lock"):
            if os.path.lexists(final):
                raise FileExistsError(final) from None
            os.rename(temporary, final)


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def try_folder(folder: Path) -> None:
    """Make a folder, and try to write into it.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"folder {folder.name or str(folder)!r} cannot be written ({error.strerror}); give another one with --out.")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
