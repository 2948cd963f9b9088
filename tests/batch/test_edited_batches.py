"""Prompt files whose lines begin with pictures, enlarge and tile."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tu_diffuse.batch.drafts import Drawn, Lost, advance, begin, open_round
from tu_diffuse.batch.engine import render
from tu_diffuse.batch.items import Item, make_items
from tu_diffuse.batch.lines import Line
from tu_diffuse.batch.outcomes import generate_commands
from tu_diffuse.batch.parking import park, taken_up
from tu_diffuse.batch.plan import Plan, extend, load_plan, save_plan
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("one.png", "two.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(32, 1)).save(folder / "mask.png")
    return folder


def _items(model: ModelFolder, beside: Path, *lines: dict[str, Any]) -> list[Item]:
    numbered = [Line(number, {"prompt": "a", **line}, dict.fromkeys(line, 7)) for number, line in enumerate(lines, 1)]
    made, problems = make_items(model, numbered, defaults={}, sweep={}, circumstances={}, beside=beside)
    assert not problems
    return made


def _mixed(model: ModelFolder, beside: Path) -> list[list[Item]]:
    edited = _items(
        model,
        beside,
        {"init_image": "one.png", "mask": "mask.png", "seed": 1},
        {"init_image": "two.png", "mask": "mask.png", "seed": 2, "sampler": "euler_a"},
        {"init_image": "two.png", "strength": 0.5, "seed": 3},
        {"upscale": 2.0, "upscale_strength": 0.75, "seed": 4, "tile": "x"},
        {"upscale": 2.0, "upscale_strength": 0.75, "upscale_mode": "latent", "seed": 5},
        {"seed": 6},
    )
    return [[item] for item in edited]


@pytest.mark.parametrize("roomy", [True, False])
def test_a_batch_draws_what_generate_draws(ensemble: ModelFolder, studio, pictures: Path, tmp_path: Path, roomy: bool):
    batches, model = _mixed(ensemble, pictures), load_model(ensemble, device="cpu")
    drawing = studio(roomy)
    results = list(render(drawing, batches, 1 << 40, tmp_path, lambda _: None))
    assert len(results) == len(batches)
    for result in results:
        alone = next(event for event in text_to_image(model, result.item.request) if isinstance(event, Picture))
        assert isinstance(result, Drawn), result
        assert torch.equal(result.pixels, alone.pixels)
        assert result.settings == alone.settings | {"item": result.item.key, "company": 0}
    if not roomy:
        assert max(Counter(drawing.loads).values()) <= 3, "pictures are encoded once for a window, not turn by turn with prompts"


def test_rows_begin_with_their_own_pictures(ensemble: ModelFolder, studio, pictures: Path, tmp_path: Path):
    both = _items(ensemble, pictures, *({"init_image": name, "mask": "mask.png", "seed": 1} for name in ("one.png", "two.png")))
    assert [[p.item for p in batch] for batch in extend(Plan("m"), both, None).batches] == [both]
    for result in render(studio(), [both], 0, tmp_path, lambda _: None):
        assert isinstance(result, Drawn)
        assert result.item.request.edit is not None
        kept = np.asarray(Image.open(pictures / result.item.request.edit.init_image.name))[:16]
        assert np.array_equal(result.pixels.numpy()[:16], kept)


def test_a_draft_of_either_round_is_parked_and_taken_up(ensemble: ModelFolder, studio, pictures: Path, tmp_path: Path):
    for line in ({"init_image": "one.png", "mask": "mask.png"}, {"upscale": 2.0, "upscale_strength": 0.75}):
        items, drawing = _items(ensemble, pictures, {"seed": 4, **line}), studio()
        wanted = next(iter(render(drawing, [items], 0, tmp_path, lambda _: None)))
        draft = open_round(drawing, begin(drawing, items))
        while (draft := advance(drawing, draft, lambda _: None)).next_expert(drawing) is not None or draft.round + 1 < len(draft.parts):
            if draft.next_expert(drawing) is None:
                draft = open_round(drawing, draft)
            park(draft, items, tmp_path)
        fresh = taken_up(ensemble, open_round(drawing, begin(drawing, items)), items, tmp_path)
        assert (fresh.round, fresh.stage) == (len(fresh.parts) - 1, 1)
        got = next(iter(render(studio(roomy=False), [items], 0, tmp_path, lambda _: None)))
        assert isinstance(wanted, Drawn)
        assert isinstance(got, Drawn)
        assert torch.equal(wanted.pixels, got.pixels)


def test_the_key_knows_the_picture_and_not_its_path(ensemble: ModelFolder, pictures: Path, tmp_path: Path):
    line = {"init_image": "one.png", "mask": "mask.png", "seed": 1}
    base = _items(ensemble, pictures, line)[0]
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    assert _items(ensemble, moved, line)[0].key == base.key
    shutil.copy(moved / "two.png", moved / "one.png")
    assert _items(ensemble, moved, line)[0].key != base.key
    others = [{"strength": 0.5}, {"mask_blur": 2.0}, {"resize": "stretch"}, {"tile": "x"}, {"mask": None}]
    assert len({base.key, *(_items(ensemble, pictures, line | other)[0].key for other in others)}) == len(others) + 1


def test_a_plan_keeps_its_pictures(ensemble: ModelFolder, pictures: Path, tmp_path: Path):
    plan = extend(Plan("m"), [item for batch in _mixed(ensemble, pictures) for item in batch], None)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path, "m") == plan


def test_a_picture_that_went_loses_its_own_item(ensemble: ModelFolder, studio, pictures: Path, tmp_path: Path):
    both = _items(ensemble, pictures, *({"init_image": name, "seed": 1} for name in ("one.png", "two.png")))
    (pictures / "one.png").unlink()
    results = {result.item.key: result for result in render(studio(), [both], 0, tmp_path, lambda _: None)}
    lost, drawn = (results[item.key] for item in both)
    assert isinstance(lost, Lost)
    assert "one.png" in lost.error
    assert isinstance(drawn, Drawn)


def test_the_command_of_a_picture_makes_it(ensemble: ModelFolder, pictures: Path):
    items = _items(ensemble, pictures, {"init_image": "one.png", "mask": "mask.png", "seed": 1}, {"upscale": 2.0, "tile": "xy", "seed": 2})
    first, second = generate_commands(ensemble, items, [])
    assert first == "tu-diffuse generate a --seed 1 --init-image one.png --strength 1 --resize crop --mask mask.png --mask-blur 0"
    assert second.endswith("--upscale 2 --upscale-mode pixel --upscale-steps 4 --upscale-strength 0.35 --tile xy")


def _lines(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.splitlines() if line.startswith("{"))


def test_a_prompt_file_and_replay(ensemble_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Paths are relative to the prompt file; a bad picture is its line's problem, with its column; replay finds the picture by its content."""
    file, out = pictures / "prompts.jsonl", tmp_path / "out"
    (pictures / "cut.png").write_bytes((pictures / "one.png").read_bytes()[:-40])
    lines = [
        {"prompt": "a", "init_image": "one.png", "mask": "mask.png", "seed": 1},
        {"prompt": "b", "init_image": "none.png"},
        {"prompt": "c", "init_image": "cut.png"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["batch", str(file), "--out", str(out), "--model", str(ensemble_folder), "--json", "--device", "cpu"]
    assert run(asked) == 1
    events = list(_lines(capsys.readouterr().out))
    problems = [event for event in events if event["event"] == "problem"]
    assert [(p["line"], p["column"]) for p in problems] == [(2, 31), (3, 31)]
    assert "none.png cannot be read" in problems[0]["message"]
    assert "cut.png cannot be used" in problems[1]["message"]
    picture = Path(next(event for event in events if event["event"] == "picture")["path"])
    assert read_metadata(picture)["edit"]["mask"]["name"] == "mask.png"
    assert str(tmp_path).encode() not in picture.read_bytes()
    replayed = ["replay", str(picture), "--model", str(ensemble_folder)]
    assert run(replayed) == 0
    moved = pictures.rename(tmp_path / "moved")
    assert run(replayed) == 2
    assert "one.png (32×32, sha256" in capsys.readouterr().err
    assert run([*replayed, "--input", str(moved)]) == 0
    assert "equal" in capsys.readouterr().out


def test_generate_and_replay(ensemble_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "new.png"
    shared = ["--model", str(ensemble_folder), "--device", "cpu"]
    asked = ["generate", "a", "--out", str(picture), "--seed", "3", "--init-image", str(pictures / "two.png"), "--strength", "0.5", "--tile", "x"]
    assert run([*asked, "--upscale", "2", *shared]) == 0
    with Image.open(picture) as drawn:
        assert drawn.size == (64, 64)
        assert "Denoising strength: 0.5" in drawn.info["parameters"]
    assert run(["replay", str(picture), "--model", str(ensemble_folder)]) == 2
    shutil.copy(pictures / "two.png", tmp_path / "two.png")
    capsys.readouterr()
    assert run(["replay", str(picture), "--model", str(ensemble_folder)]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_dry_run_and_a_sweep_over_strengths(ensemble: ModelFolder, pictures: Path):
    line = Line(1, {"prompt": "a", "init_image": "one.png", "seed": 1}, {})
    made, problems = make_items(ensemble, [line], defaults={}, sweep={"strength": [0.1, 0.5, 1.0]}, circumstances={}, beside=pictures)
    assert not made
    assert "--strength 0.1 of 4 steps" in problems[0].message
    made, _ = make_items(ensemble, [line], defaults={"steps": 20}, sweep={"strength": [0.1, 0.5]}, circumstances={}, beside=pictures)
    assert [item.request.edit and item.request.edit.strength for item in made] == [0.1, 0.5]
    assert replace(made[0], key="") != replace(made[1], key="")
