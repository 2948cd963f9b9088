"""Folders as `tu-diffuse batch` leaves them, made without a model: each picture is one colour of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tu_diffuse.batch.items import Item
from tu_diffuse.batch.journal import Entry, append
from tu_diffuse.batch.plan import Plan, extend, save_plan


def colour(number: int) -> tuple[int, int, int]:
    """Distinct for all numbers up to 4095; no grey."""
    return 8 + number % 16 * 15, 8 + number // 16 % 16 * 15, 1 + number // 256 * 2


def picture_folder(out: Path, items: Sequence[Item], *, before: Plan | None = None, **entries: Mapping[int, Any]) -> Plan:
    """Plan items and draw them.

    Args:
        out: the folder, which must be there.
        items: the i-th gets `colour(i)`.
        before: the folder's plan until now.
        entries: `failed` = {i: reason}, `left` = {i: ...} (not drawn), `score` = {i: number}, `truncated` = {i: {...}}.
    """
    plan = extend(Plan("m") if before is None else before, items, None)
    save_plan(plan, out)
    places = {item.key: i for i, item in enumerate(items)}
    for planned in plan.wanted:
        i, item = places[planned.item.key], planned.item
        if i in entries.get("left", {}) or (out / planned.name).exists():
            continue
        if (reason := entries.get("failed", {}).get(i)) is not None:
            append(out, Entry(item.key, item.line, "failed", error=reason))
            continue
        Image.new("RGB", (item.request.width, item.request.height), colour(i)).save(out / planned.name)
        more = {name: entries[name][i] for name in ("score", "truncated") if i in entries.get(name, {})}
        append(out, Entry(item.key, item.line, "done", file=planned.name, **more))
    return plan
