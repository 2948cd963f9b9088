"""Runs of `tu-diffuse` that are killed: each is a process forked from one that has imported all and run nothing, so it starts at once.

Kill points are file operations, seen by an audit hook in the forked process; the program has no code for them.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import psutil
from safetensors import safe_open
from tu_diffuse.batch.studio import Studio
from tu_diffuse.cli.batch_progress import Reporter
from tu_diffuse.cli.main import main
from tu_diffuse.training import finetune
from tu_diffuse.training.checkpoints import load_newest

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "peft",
        "bitsandbytes",
        "tu_diffuse.cli.main",
        "tu_diffuse.training.finetune",
        *(f"tu_diffuse.batch.{name}" for name in ("estimate", "items", "journal", "plan", "run", "studio")),
        *(f"tu_diffuse.pipeline.{name}" for name in ("previews", "text_to_image")),
    ]
)


@dataclass(frozen=True)
class At:
    """A file operation: the name of its audit event, a pattern that one of its paths holds, and which of those that fit.

    `torn`: its file (of two, the first) is left as a write that was cut short leaves it. `signals`: sent at it, and at those after it.
    """

    event: str
    path: str
    nth: int = 1
    torn: bool = False
    signals: tuple[int, ...] = (signal.SIGKILL,)


def start(arguments: list[str], keys: Path, at: At | None = None, *, beside: bool = False) -> Any:
    """Start a run, a `multiprocessing.Process`; it appends what it does to the file `keys` (see `_RECORDERS`), and kills itself at `at`.

    `beside`: a batch is decoded while the next one is drawn, else between the two.
    """
    process = _SERVER.Process(target=_child, args=(arguments, keys, at, beside))
    process.start()
    return process


def finish(arguments: list[str], keys: Path, *, beside: bool = False) -> float:
    """Run to the end; returns the seconds it took."""
    started = time.monotonic()
    process = start(arguments, keys, beside=beside)
    process.join(300)
    assert process.exitcode == 0, keys.with_suffix(".err").read_text()
    return time.monotonic() - started


def kill_after(arguments: list[str], keys: Path, seconds: float) -> bool:
    """Kill a run after so many seconds; False if it was at its end before."""
    process = start(arguments, keys)
    process.join(seconds)
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), keys.with_suffix(".err").read_text()
    return process.exitcode != 0


def kill_at(arguments: list[str], keys: Path, at: At, *, beside: bool = False) -> None:
    """Start a run that kills itself at `at`."""
    process = start(arguments, keys, at, beside=beside)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, f"{at} was not reached: {keys.with_suffix('.err').read_text()}"


def _child(arguments: list[str], keys: Path, at: At | None, beside: bool) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and so would we
    errors = os.open(keys.with_suffix(".err"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    _RECORDERS.get(arguments[0], lambda keys: None)(keys)
    if at is not None:
        _kill_self(at)
    setattr(Studio, "decodes_beside", beside)  # noqa: B010  # a property
    sys.argv = ["tu-diffuse", *arguments]
    main()


def _record_samples(keys: Path) -> None:
    """[micro-step, sample numbers] of each batch that is read."""
    real = finetune.read_batches

    def recorded(plan: Any, source: Any, first: int, workers: Any) -> Iterator[Any]:
        for step, batch in zip(count(first), real(plan, source, first, workers), strict=False):
            _append(keys, [step, [number for number, _ in batch]])
            yield batch

    finetune.read_batches = recorded


def _record_steps(keys: Path) -> None:
    """{"rows": pictures} of each denoising step, and what the process holds after each picture."""
    process = psutil.Process()

    def entry(self: Reporter, entry: Any, original: Any = Reporter.entry) -> None:
        original(self, entry)
        memory, files = process.memory_info().rss, process.num_fds()
        _append(keys, {"memory": memory, "files": files, "threads": process.num_threads(), "children": len(process.children())})

    Reporter.step = lambda self, event: _append(keys, {"rows": event.pictures})
    Reporter.entry = entry


_RECORDERS = {"finetune": _record_samples, "batch": _record_steps}


def _append(keys: Path, line: Any) -> None:
    with keys.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _kill_self(at: At) -> None:
    seen: list[str] = []

    def hook(event: str, details: tuple[Any, ...]) -> None:
        paths = [os.fspath(path) for path in details if isinstance(path, str | os.PathLike)] if event == at.event else []
        if not any(re.search(at.path, path) for path in paths):
            return
        seen.append(paths[0])
        number = len(seen)
        if number == at.nth and at.torn:
            _tear(Path(paths[0]), appending=event == "open" and "a" in (details[1] or ""))
        if 0 <= number - at.nth < len(at.signals):
            os.kill(os.getpid(), at.signals[number - at.nth])

    sys.addaudithook(hook)


def _tear(path: Path, appending: bool) -> None:
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content + b'{"step": 2' if appending else content[: len(content) // 2] or b"{")


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves, to be compared bit for bit: path -> content, and every checkpoint but the newest left aside."""
    newest = sorted((out / "checkpoints").glob("checkpoint-*"))[-1]
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): _content(path) for path in files if path.parent == newest or not path.parent.name.startswith("checkpoint-")}


def _content(path: Path) -> Any:
    if path.name == "manifest.json":
        return sorted(json.loads(path.read_text()))
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}, file.metadata()


def samples(keys: Path) -> dict[int, list[int]]:
    """Sample numbers by micro-step; a step that was taken again after a kill must have had the same ones."""
    taken: dict[int, list[int]] = {}
    for line in keys.read_text().splitlines():
        step, numbers = json.loads(line)
        assert taken.setdefault(step, numbers) == numbers, step
    return taken


def told(keys: Path) -> list[dict[str, int]]:
    """What a run of batch told: see `_record_steps`. The last line may be torn."""
    lines = keys.read_text().split("\n")[:-1] if keys.exists() else []
    return [json.loads(line) for line in lines]


def check_a_checkpoint_is_left(out: Path) -> int | None:
    """Once a checkpoint has its name, a whole one is there at every moment; returns its step."""
    found = load_newest(out / "checkpoints")
    assert found is not None or not list((out / "checkpoints").glob("checkpoint-*"))
    return None if found is None else found.step
