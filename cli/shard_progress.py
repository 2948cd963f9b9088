"""Progress over shards on standard error: a bar on a terminal, one plain line a shard elsewhere."""

import itertools
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


def printable(text: str) -> str:
    """Keep control characters that came with a shard off the terminal."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[str], None]]:
    """Yield a function that reports one finished shard of `total`, with a line about it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        numbers = itertools.count(1)
        yield lambda line: print(printable(f"{what} {next(numbers)}/{total} {line}"), file=sys.stderr)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda line: bar.update(task, advance=1, description=printable(line))
