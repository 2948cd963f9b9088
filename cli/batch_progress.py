"""What `batch` tells while it draws."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ..batch.drafts import Stepped
    from ..batch.estimate import Expected
    from ..batch.journal import Entry
    from ..batch.lines import Problem
    from ..batch.plan import Plan
    from ..batch.run import Summary


class Reporter:
    """Tells of progress: JSON lines on standard output, or paths on standard output and the rest on standard error."""

    def __init__(self, as_json: bool, out: Path) -> None:
        self._json, self._out, self._stdout = as_json, out, sys.stdout
        self._started, self._wanted, self._there = time.monotonic(), 0, 0
        self._tried = self.deaths = 0

    def problem(self, problem: "Problem") -> None:
        """Say what is wrong with a line."""
        self._event("problem", asdict(problem), f"line {problem.line}, column {problem.column}: {problem.message}")

    def note(self, text: str) -> None:
        """Say what the folder's pictures record too."""
        print(text, file=sys.stderr, flush=True)

    def expected(self, expected: "Expected") -> None:
        """Say what would be drawn."""
        text = (
            f"{expected.pictures} pictures, {expected.there} there, {expected.missing} to draw in {expected.batches} batches; {expected.loads} loads "
            f"of model parts, about {expected.megabytes:.0f} MB of memory and {expected.seconds:.0f} s (by {expected.source})"
        )
        self._event("expected", asdict(expected), "\n".join([text, *expected.names]))

    def plan(self, plan: "Plan", there: int) -> None:
        """Say what will be drawn."""
        self._wanted, self._there = len(plan.wanted), there
        facts = {"pictures": self._wanted, "batches": len(plan.batches), "there": there}
        self._event("plan", facts, f"{self._wanted} pictures in {len(plan.batches)} batches, {there} there")

    def step(self, event: "Stepped") -> None:
        """On a terminal, say which expert is at work."""
        if not self._json and sys.stderr.isatty():
            print(f"\r{self._progress()}, {event.expert}\033[K", end="", file=sys.stderr, flush=True)

    def entry(self, entry: "Entry") -> None:
        """Say what became of an item."""
        self._tried += 1
        facts = {name: value for name, value in asdict(entry).items() if name not in ("status", "file")} | {"progress": self._numbers()}
        if entry.status == "failed":
            self._event("failed", facts, f"line {entry.line}: {entry.error}")
            return
        path = str(self._out / str(entry.file))
        self._event("picture", {"path": path, **facts}, path, self._stdout)
        for encoder, words in {} if self._json else entry.truncated.items():
            self._event("", {}, f"line {entry.line}: not seen by the text encoder {encoder}: {words}")

    def died(self, reason: str) -> None:
        """Say that a worker died."""
        self.deaths += 1
        self._event("died", {"reason": reason}, f"a worker died and what it had in hand is drawn again: {reason}")

    def summary(self, summary: "Summary") -> None:
        """Say what the run came to."""
        text = f"{summary.asked} asked: {summary.done} done, {summary.failed} failed, {summary.blocked} blocked as bad lines, {summary.skipped} left"
        self._event("summary", asdict(summary), f"{text}; {summary.drawn} drawn now, in {summary.seconds:.1f} s")

    def _numbers(self) -> dict[str, float]:
        speed = self._tried / (time.monotonic() - self._started)
        left = self._wanted - self._there - self._tried
        return {
            "done": self._there + self._tried,
            "pictures": self._wanted,
            "pictures_per_second": round(speed, 3),
            "seconds_left": round(left / speed),
        }

    def _progress(self) -> str:
        if not self._tried:
            return f"{self._there}/{self._wanted}"
        now = self._numbers()
        left = time.strftime("%H:%M:%S", time.gmtime(now["seconds_left"]))
        return f"{now['done']}/{now['pictures']}, {now['pictures_per_second']:.2f} pictures/s, {left} left"

    def _event(self, event: str, facts: dict[str, Any], text: str, stream: TextIO | None = None) -> None:
        if self._json:
            print(json.dumps({"event": event, **facts}), file=self._stdout, flush=True)
        else:
            print(text, file=sys.stderr if stream is None else stream, flush=True)
