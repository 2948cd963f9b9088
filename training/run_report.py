"""The report of a run, from the files in its folder: `report.html`, one file that needs nothing else, and `report.png`.

Curves of the loss, by noise level and by expert, learning rate, gradient and validation loss, and the validation pictures by step.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .curves import HEIGHT, INK, SOFT, WIDTH, Curve, Panel, colours, draw_panel, smoothed

SHOWN_STEPS = 8  # at most so many validations are shown in pictures: the first, the last, and some between
_THUMB = 192  # pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202024; background: #f4f5f7; margin: 0 auto; padding: 24px; max-width: 1320px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 28px 0 8px } p { color: #62626a; margin: 0 0 16px }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 14px }
.curves img, .card { background: white; border-radius: 8px; box-shadow: 0 1px 3px #0002; width: 100% }
.card { overflow-x: auto; width: auto; padding: 8px 16px }
table { border-collapse: collapse } td, th { padding: 4px 12px; text-align: left; vertical-align: top }
td.step { color: #62626a; vertical-align: middle; white-space: nowrap } td img { display: block; border-radius: 4px; width: 192px }
.options td:first-child { color: #62626a } th.prompt { width: 192px; font-weight: 400 }
"""


def write_report(out: Path, title: str, options: Mapping[str, object], prompts: Sequence[str]) -> None:
    """Write `report.html` and `report.png` into the folder of a run, from its `checkpoints/losses.jsonl` and `validation/`.

    Args:
        out: the run's folder.
        title: what was trained.
        options: listed below the curves, those that are None left out.
        prompts: of the validation pictures, by number.
    """
    panels = [draw_panel(panel) for panel in panels_of(_lines(out / "checkpoints" / "losses.jsonl"), _lines(out / "validation" / "validation.jsonl"))]
    pictures = _pictures(out / "validation", prompts)
    _replace(out / "report.html", _html(title, options, prompts, panels, pictures).encode())
    _replace(out / "report.png", _png(_poster(title, prompts, panels, pictures)))


def panels_of(log: Sequence[Mapping[str, float]], validation: Sequence[Mapping[str, float]]) -> list[Panel]:
    """The panels of a loss log and of the validations, those that have values.

    Args:
        log: lines of `losses.jsonl`, "step" and scalars.
        validation: lines of `validation.jsonl`, "step" and the loss at each noise level.
    """
    told = _series(log)
    loss = told.get("loss", [])
    panels = [Panel("Training loss", [Curve("each line", loss, faint=True), Curve("smoothed", smoothed(loss))])] if loss else []
    for title, prefix in (("Loss by noise level (timesteps)", "loss/t"), ("Loss by expert", "loss/expert/")):
        found = {name.removeprefix(prefix): points for name, points in told.items() if name.startswith(prefix)}
        if len(found) > 1:
            ordered = sorted(found.items(), key=lambda item: int(item[0].partition("-")[0])) if prefix == "loss/t" else list(found.items())
            panels.append(Panel(title, _family([(name, smoothed(points)) for name, points in ordered])))
    levels = _series(validation)
    if levels:
        panels.append(Panel("Validation loss at fixed noise levels", _family(list(levels.items()))))
    for title, name in (("Learning rate", "lr"), ("Length of the gradient", "grad_norm")):
        if name in told:
            panels.append(Panel(title, [Curve(name, told[name])], linear=name == "lr"))
    return panels


def _series(lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> its (step, value) points; values that are not finite are left out."""
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    points = {name: [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])] for name in names}
    return {name: found for name, found in points.items() if found}


def _family(series: Sequence[tuple[str, list[tuple[float, float]]]]) -> list[Curve]:
    return [Curve(name, points, colour) for (name, points), colour in zip(series, colours(len(series)), strict=True)]


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _pictures(folder: Path, prompts: Sequence[str]) -> list[tuple[int, list[Path]]]:
    """The steps that are shown, each with the picture of every prompt."""
    found = sorted(path for path in folder.glob("step*-*.png") if re.fullmatch(r"step\d+-\d+\.png", path.name))
    steps = sorted({int(path.name.partition("-")[0][4:]) for path in found})
    whole = [(step, [folder / picture_name(step, number) for number in range(len(prompts))]) for step in steps]
    whole = [(step, paths) for step, paths in whole if paths and all(path.exists() for path in paths)]
    if len(whole) <= SHOWN_STEPS:
        return whole
    return [whole[round(i * (len(whole) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]


def picture_name(step: int, number: int) -> str:
    """File name of the validation picture of prompt `number`."""
    return f"step{step:06d}-{number}.png"


def _html(
    title: str, options: Mapping[str, object], prompts: Sequence[str], panels: Sequence[Image.Image], pictures: Sequence[tuple[int, list[Path]]]
) -> str:
    curves = "".join(f'<img alt="curves" src="{_inline(_png(panel))}">' for panel in panels)
    rows = [
        f'<td class="step">step {step}</td>' + "".join(f'<td><img alt="" src="{_inline(_thumb(path))}"></td>' for path in paths)
        for step, paths in pictures
    ]
    head = "<th></th>" + "".join(f'<th class="prompt">{html.escape(prompt)}</th>' for prompt in prompts)
    drawn = f'<h2>Validation pictures</h2><div class="card"><table><tr>{head}</tr><tr>{"</tr><tr>".join(rows)}</tr></table></div>' if rows else ""
    listed = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_shown(value))}</td></tr>" for name, value in options.items() if value is not None
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f'<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>tu-diffuse finetune</p><div class="curves">{curves}</div>{drawn}'
        f'<h2>Options</h2><div class="card"><table class="options">{listed}</table></div></html>\n'
    )


def _poster(title: str, prompts: Sequence[str], panels: Sequence[Image.Image], pictures: Sequence[tuple[int, list[Path]]]) -> Image.Image:
    """Curves two in a row, the pictures of each shown step below."""
    head, gap, margin = 60, 12, 80
    rows = math.ceil(len(panels) / 2)
    width = max(2 * WIDTH + 3 * gap, margin + 20 + len(prompts) * (_THUMB + gap) if pictures else 0)
    below = 36 + len(pictures) * (_THUMB + gap) if pictures else 0
    picture = Image.new("RGB", (width, head + rows * (HEIGHT + gap) + below), (244, 245, 247))
    draw = ImageDraw.Draw(picture)
    draw.text((gap + 4, 18), title, INK, ImageFont.load_default(24))
    for i, panel in enumerate(panels):
        picture.paste(panel, (gap + i % 2 * (WIDTH + gap), head + i // 2 * (HEIGHT + gap)))
    top, font = head + rows * (HEIGHT + gap) + 30, ImageFont.load_default(13)
    for number, prompt in enumerate(prompts if pictures else ()):
        draw.text((margin + 20 + number * (_THUMB + gap), top - 24), prompt if len(prompt) <= 28 else f"{prompt[:27]}…", INK, font)
    for row, (step, paths) in enumerate(pictures):
        y = top + row * (_THUMB + gap)
        draw.text((margin + 8, y + _THUMB // 2), f"step {step}", SOFT, font, anchor="rm")
        for number, path in enumerate(paths):
            with Image.open(io.BytesIO(_thumb(path))) as small:
                picture.paste(small, (margin + 20 + number * (_THUMB + gap), y))
    return picture


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _thumb(path: Path) -> bytes:
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
        if max(small.size) < _THUMB:
            factor = _THUMB / max(small.size)
            small = small.resize((round(small.width * factor), round(small.height * factor)), Image.Resampling.BICUBIC)
        return _png(small)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return stream.getvalue()


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is whole at every moment."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    draft.replace(path)
