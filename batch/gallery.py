"""The gallery: one HTML page beside the pictures of a folder, for any browser and without a network."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..pipeline.model.folder import ModelFolder
from .files import locked
from .files import replace as write_whole
from .lines import Problem
from .outcomes import Outcome, generate_commands, head_line, outcomes, usual_settings
from .plan import Plan

GALLERY_FILE = "gallery.html"


def write_gallery(folder: ModelFolder, plan: Plan, out: Path, *, problems: Sequence[Problem], shared: Sequence[str]) -> Path:
    """Write `gallery.html`: the page of batch/gallery.html with the folder's pictures as its data.

    It links to the pictures, which are loaded as they come into view; what it holds itself is text, about half a kilobyte a picture. Prompts cannot
    act in it: data are JSON that is put in as text, and the page's policy allows its own script only and pictures beside it.

    Args:
        folder: the model.
        plan: what is asked for.
        out: the folder; what its journal says when this begins is shown, so of several processes the last shows all.
        problems: of the prompt file.
        shared: arguments that all commands end in, from `outcomes.shared_arguments`.

    Raises:
        OutputError: the folder cannot be written.
    """
    with locked(out / ".gallery.lock"):
        found = outcomes(folder, plan, out)
        commands = generate_commands(folder, [outcome.item for outcome in found], shared)
        usual = usual_settings(found)
        data = {
            "usual": usual,
            "common": head_line(folder, usual),
            "problems": [{"line": problem.line, "message": f"column {problem.column}: {problem.message}"} for problem in problems],
            "items": [_record(outcome, command) for outcome, command in zip(found, commands, strict=True)],
        }
        write_whole(_page(out.resolve().name, data).encode(), out / GALLERY_FILE)
    return out / GALLERY_FILE


def _record(outcome: Outcome, command: str) -> dict[str, Any]:
    request, entry = outcome.item.request, outcome.entry
    notes: list[tuple[str, str]] = []
    if entry is not None:
        notes = [
            *((f"not seen by {encoder}", words) for encoder, words in entry.truncated.items()),
            *(("fallback", name) for name in entry.fallbacks),
        ]
    return {
        "line": outcome.item.line,
        "prompt": request.prompt,
        "file": None if outcome.file is None else f"./{quote(outcome.file)}",
        "error": outcome.error,
        "width": request.width,
        "height": request.height,
        "settings": outcome.settings,
        "notes": notes,
        "command": command,
    }


def _page(title: str, data: dict[str, Any]) -> str:
    """The template filled in; ASCII JSON without "<" can neither end the element that holds it nor be anything but data."""
    template = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0] for tag in ("style", "script"))
    policy = f"default-src 'none'; img-src 'self' file:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    values = {"policy": policy, "title": html.escape(title), "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")}
    return re.sub(r"\{\{(\w+)\}\}", lambda field: values[field[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
