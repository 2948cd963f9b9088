"""Contact sheets: the pictures of a folder in rows, with captions, as PNG files to look through."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ..errors import DataError
from ..pipeline.metadata import open_picture
from ..pipeline.model.folder import ModelFolder
from .files import locked
from .files import replace as write_whole
from .journal import read_journal
from .lettering import Lettering
from .outcomes import Outcome, Value, head_line, outcomes, usual_settings
from .plan import Plan

SHEET = "contact-sheet"
PER_PAGE = 100
_WIDTH, _MARGIN, _GAP = 1600, 32, 24
_LEAST, _MOST = 160, 256  # side of the squares that pictures are fitted into
_LINES = 3
_REASON = 120  # least height of a frame
_PAPER, _INK, _FAINT, _FRAME, _FAILED = "#ffffff", "#1c1c1c", "#767676", "#d8d8d8", "#a3392f"
_TITLE, _PROMPT, _DETAIL = Lettering(15), Lettering(13), Lettering(12)
_FOOT = "Empty boxes stand for characters that no font of this machine has."
_KEY = "tu-diffuse-sheet"


@dataclass(frozen=True)
class _Tile:
    """A picture and its caption.

    Attributes:
        file: of the picture; None for one that failed.
        changed: when the file was, in nanoseconds.
        reason: of failure.
        size: (width, height) of the picture on the page, or of the frame.
        prompt: what it should show.
        details: line and unusual settings.
    """

    file: str | None
    changed: int
    reason: str
    size: tuple[int, int]
    prompt: str
    details: str


@dataclass(frozen=True)
class _Page:
    """What a page shows: title, settings, and tiles in squares of a side."""

    title: str
    settings: str
    side: int
    tiles: tuple[_Tile, ...]

    @property
    def digest(self) -> str:
        """Of all that decides its pixels."""
        return hashlib.sha256(repr(self).encode("utf-8", "backslashreplace")).hexdigest()


def write_sheet(folder: ModelFolder, plan: Plan, out: Path) -> list[Path]:
    """Write `contact-sheet.png`, `contact-sheet-2.png` and so on, 100 pictures each, in the order of the prompt file.

    Pictures are never enlarged. One that failed is an empty frame with the reason; one that is not drawn yet is left out. A page that shows this
    already is left as it is; pages beyond the last are removed. Where a picture has such a name, the sheet's begins with "_".

    Args:
        folder: the model.
        plan: what is asked for.
        out: the folder; what its journal says when this begins is shown, so of several processes the last shows all.

    Returns:
        The pages; none where nothing is drawn yet.

    Raises:
        OutputError: the folder cannot be written.
    """
    with locked(out / f".{SHEET}.lock"):
        names, pages = _page_names(plan, out), list[Path]()
        for page in _pages(folder, outcomes(folder, plan, out), out):
            path = out / next(names)
            if _digest_of(path) != page.digest:
                write_whole(_encoded(_drawn(page, out), page), path)
            pages.append(path)
        for name in names:
            if not (out / name).is_file():
                return pages
            (out / name).unlink()
    raise AssertionError("names never end")


def _page_names(plan: Plan, out: Path) -> Iterator[str]:
    pictures = {planned.name for planned in plan.wanted} | {entry.file for entry in read_journal(out).values() if entry.file is not None}
    stem = SHEET
    while any(name.casefold().startswith(stem) for name in pictures):
        stem = f"_{stem}"
    return (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in count(1))


def _pages(folder: ModelFolder, all_outcomes: Sequence[Outcome], out: Path) -> Iterator[_Page]:
    found = [outcome for outcome in all_outcomes if outcome.entry is not None]
    usual = usual_settings(found)
    failed = sum(outcome.file is None for outcome in found)
    largest = max((max(o.item.request.width, o.item.request.height) for o in found), default=_LEAST)
    side = min(max(largest, _LEAST), _MOST)
    settings = " · ".join(_said(name, value) for name, value in head_line(folder, usual))
    starts = range(0, len(found), PER_PAGE)
    for number, start in enumerate(starts, 1):
        pictures = f"{len(found) - failed} picture{'' if len(found) - failed == 1 else 's'}"
        parts = [pictures, *([f"{failed} failed"] if failed else []), *([f"page {number} of {len(starts)}"] if len(starts) > 1 else [])]
        yield _Page(" · ".join(parts), settings, side, tuple(_tile(outcome, usual, side, out) for outcome in found[start : start + PER_PAGE]))


def _tile(outcome: Outcome, usual: Mapping[str, Value], side: int, out: Path) -> _Tile:
    request = outcome.item.request
    share = min(1.0, side / max(request.width, request.height))
    width, height = max(1, round(request.width * share)), max(1, round(request.height * share))
    details = [f"line {outcome.item.line}", *(_said(name, value) for name, value in outcome.settings.items() if usual.get(name) != value)]
    return _Tile(
        file=outcome.file,
        changed=0 if outcome.file is None else (out / outcome.file).stat().st_mtime_ns,
        reason=outcome.error or "",
        size=(width, height) if outcome.error is None else (side, max(height, _REASON)),
        prompt=request.prompt,
        details=" · ".join(details),
    )


def _said(name: str, value: Value) -> str:
    return f"{name} {value}".replace("×", "x")  # which Pillow's font lacks


def _drawn(page: _Page, out: Path) -> Image.Image:
    columns = min((_WIDTH - 2 * _MARGIN + _GAP) // (page.side + _GAP), max(len(page.tiles), 3))
    width = columns * (page.side + _GAP) - _GAP
    settings = _DETAIL.wrapped(page.settings, width, _LINES)
    captions = [(_PROMPT.wrapped(t.prompt, page.side, _LINES), _DETAIL.wrapped(t.details, page.side, _LINES)) for t in page.tiles]
    rows = [range(i, min(i + columns, len(page.tiles))) for i in range(0, len(page.tiles), columns)]
    tall = [max(page.tiles[i].size[1] for i in row) for row in rows]
    under = [6 + max(len(captions[i][0]) * _PROMPT.line + len(captions[i][1]) * _DETAIL.line for i in row) for row in rows]
    foot = [_FOOT] if any(_PROMPT.lacks(line) for prompt, _ in captions for line in prompt) else []
    top = _MARGIN + _TITLE.line + len(settings) * _DETAIL.line + _GAP
    height = top + sum(tall) + sum(under) + len(rows) * _GAP + len(foot) * (_DETAIL.line + _GAP) + _MARGIN - _GAP

    sheet = Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
    _TITLE.draw(sheet, (_MARGIN, _MARGIN), page.title, _INK)
    _write(sheet, (_MARGIN, _MARGIN + _TITLE.line), settings, _DETAIL, _FAINT)
    for row, row_height, caption_height in zip(rows, tall, under, strict=True):
        for column, i in enumerate(row):
            left, bottom = _MARGIN + column * (page.side + _GAP), top + row_height
            prompt, details = captions[i]
            _place(sheet, (left, bottom), (page.side, row_height), page.tiles[i], out)
            _write(sheet, (left, bottom + 6), prompt, _PROMPT, _INK)
            _write(sheet, (left, bottom + 6 + len(prompt) * _PROMPT.line), details, _DETAIL, _FAINT)
        top += row_height + caption_height + _GAP
    _write(sheet, (_MARGIN, top), foot, _DETAIL, _FAINT)
    return sheet


def _place(sheet: Image.Image, corner: tuple[int, int], room: tuple[int, int], tile: _Tile, out: Path) -> None:
    """Paste a picture onto the line that captions hang from, or draw an empty frame with the reason; corner is the lower left one."""
    left, bottom = corner
    picture, reason = (None, tile.reason) if tile.file is None else _small(out / tile.file, tile.size)
    if picture is not None:
        sheet.paste(picture, (left, bottom - picture.height))
        return
    width, height = room
    ImageDraw.Draw(sheet).rectangle((left, bottom - height, left + width - 1, bottom - 1), outline=_FRAME)
    lines = _DETAIL.wrapped(reason, width - 24, (height - 20) // _DETAIL.line)
    _write(sheet, (left + 12, bottom - height + 10), lines, _DETAIL, _FAILED)


def _small(path: Path, size: tuple[int, int]) -> tuple[Image.Image | None, str]:
    """A picture of a size; or why there is none."""
    try:
        with open_picture(path) as picture:
            picture.draft("RGB", size)
            return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0), ""
    except (DataError, OSError, SyntaxError):
        return None, f"{path.name} is damaged; remove it and run again."


def _write(sheet: Image.Image, corner: tuple[int, int], lines: Sequence[str], lettering: Lettering, colour: str) -> None:
    for i, line in enumerate(lines):
        lettering.draw(sheet, (corner[0], corner[1] + i * lettering.line), line, colour)


def _encoded(sheet: Image.Image, page: _Page) -> bytes:
    chunks, buffer = PngInfo(), BytesIO()
    chunks.add_text(_KEY, page.digest)
    sheet.save(buffer, "PNG", pnginfo=chunks, compress_level=3)
    return buffer.getvalue()


def _digest_of(path: Path) -> str | None:
    with suppress(DataError), open_picture(path) as sheet:
        return sheet.info.get(_KEY)
    return None
