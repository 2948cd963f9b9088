"""Every error that tu-diffuse raises on purpose, each with the exit code that `cli/main.py` returns.

    TuDiffuseError
    ├── UsageError         2   an option or argument that cannot be used
    ├── UnsafeError        3   a file refused because loading it could run code
    ├── ModelError         4   a model folder, weight file or config that is not valid
    ├── DataError          4   a picture, prompt file or shard that is not valid
    ├── RenderError        1   a picture that could not be made (NaN, out of memory)
    ├── TrainingError      1   a training run that could not go on (NaN)
    ├── HubError           1   a hub that cannot be reached, or sends something else than it promised
    └── OutputError       74   a file that could not be written

A message is one sentence: what came, what was wanted, what to do.
"""


class TuDiffuseError(Exception):
    """Base of the tree; never raised itself."""

    exit_code = 1


class UsageError(TuDiffuseError):
    """An option or argument that cannot be used."""

    exit_code = 2


class UnsafeError(TuDiffuseError):
    """A file that is refused because loading it could run code."""

    exit_code = 3


class ModelError(TuDiffuseError):
    """A model folder, weight file or config that is not valid."""

    exit_code = 4


class DataError(TuDiffuseError):
    """A picture, prompt file or shard that is not valid."""

    exit_code = 4


class RenderError(TuDiffuseError):
    """A picture that could not be made."""

    exit_code = 1


class TrainingError(TuDiffuseError):
    """A training run that could not go on."""

    exit_code = 1


class HubError(TuDiffuseError):
    """A hub that cannot be reached, or sends something else than it promised."""

    exit_code = 1


class OutputError(TuDiffuseError):
    """A file that could not be written."""

    exit_code = 74


def first_line(error: BaseException) -> str:
    """What a library's error says, at most 300 characters of its first line; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


_OUT_OF_MEMORY = ("allocate memory", "out of memory", "not enough memory")  # as Linux, accelerators and Windows say it


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device: `MemoryError`, PyTorch's own, or any other library's in these words."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch is imported by the commands that need it
    said = not isinstance(error, TuDiffuseError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or named or said
