"""Progress over shards on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


def printable(text: str) -> str:
    """Keep control characters that came with a shard off the terminal."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


class Say(Protocol):
    """Reports `done` more of a total, with a line about it or "" for none."""

    def __call__(self, line: str, done: int = 1) -> None: ...  # noqa: D102


@contextmanager
def progress(what: str, total: int) -> Generator[Say]:
    """Yield a function that reports progress towards `total`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def say(line: str, done: int = 1) -> None:
            bar.update(task, advance=done, description=printable(line) or None)

        yield say


def _lines(what: str, total: int) -> Say:
    count = 0

    def say(line: str, done: int = 1) -> None:
        nonlocal count
        count += done
        if line:
            print(printable(f"{what} {count}/{total} {line}"), file=sys.stderr)

    return say
