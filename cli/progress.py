"""Progress on standard error: a bar on a terminal, one plain line a step elsewhere."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..pipeline import text_to_image


class Reporter:
    """Tells a person what is going on. Nothing that came with a prompt or a model is read as markup."""

    def __init__(self, total: int) -> None:
        """Prepare for a run of `total` denoising steps."""
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True) if self._console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("drawing", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, event: text_to_image.Progress) -> None:
        """Report one finished denoising step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{event.expert} sigma {event.sigma:.3g}")
        else:
            print(f"step {event.index + 1}/{event.steps} {event.expert} sigma {event.sigma:.4g}", file=sys.stderr)

    def say(self, line: str) -> None:
        """Print one line for people."""
        self._console.print(Text(line), soft_wrap=True)
