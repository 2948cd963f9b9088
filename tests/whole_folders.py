"""Folders that `tu-diffuse batch` fills, and what they must be like whatever happened to the runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tu_diffuse.batch.journal import read_journal


def digests(folder: Path) -> dict[str, str]:
    """File name -> hash of its pixels, of all pictures in a folder, and in GenEval's folders in it."""
    found: dict[str, str] = {}
    for path in (*folder.glob("*.png"), *folder.glob("*/samples/*.png")):
        if path.name[0].isdigit():
            with Image.open(path) as image:
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary, which must add up."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["done"] + summary["failed"] + summary["blocked"] + summary["skipped"] == summary["asked"]
    return summary


def leftovers(folder: Path) -> list[str]:
    """Files that only a run at work may have."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


def check_complete(folder: Path, whole: dict[str, str]) -> None:
    """All pictures of `whole`, with the same pixels, each once in the journal; a summary that says so, and nothing else left."""
    assert digests(folder) == whole
    assert sorted(str(entry.file) for entry in read_journal(folder).values()) == sorted(whole)
    counts = [summary_of(folder)[name] for name in ("asked", "done", "failed", "blocked", "skipped")]
    assert counts == [len(whole), len(whole), 0, 0, 0]
    assert leftovers(folder) == []
