"""The scripts that build the embedded model, one step each from nothing to a picture; and the parts of them that closed forms can check."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_grounding import KINDS, UNCOLOURED, layout, scenes_and_captions
from train_t5 import corrupt
from train_tokenizers import texts, train_clip, train_t5
from tu_diffuse.text_encoders.tokenizer import load_tokenizer
from world import COLOURS, render

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "embedded"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def test_span_corruption_loses_nothing() -> None:
    rng = random.Random(0)
    masked = 0
    for _ in range(200):
        ids = [rng.randrange(3, 100) for _ in range(rng.randrange(1, 40))]
        source, target = corrupt(ids, 500, rng)
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 500:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        assert [token for part in source[:-1] for token in (spans[part] if part >= 500 else [part])] == ids
        masked += sum(map(len, spans.values())) / len(ids)
    assert 0.14 < masked / 200 < 0.24


@pytest.mark.skipif(not FONT.exists(), reason="needs the font fonts-noto-color-emoji")
def test_layouts_are_where_the_objects_are() -> None:
    """Cells of the label grid show what the picture shows at their centre."""
    scenes, _ = scenes_and_captions(random.Random(3), 60)
    truth = layout(scenes)
    shown = right = 0
    for row, scene in enumerate(scenes):
        empty = render(replace(scene, objects=()))
        changed = np.abs(render(scene).astype(int) - empty).max(axis=2)[8::16, 8::16].flatten() > 20
        kinds = [KINDS[kind] for kind in truth.kind[row].tolist()]
        objects = {thing.kind for thing in scene.objects}
        assert set(kinds) - objects == {scene.background}
        assert objects <= set(kinds)
        shown += changed.sum()
        right += sum(kind in objects for kind, seen in zip(kinds, changed, strict=True) if seen)
        coloured = [tuple(COLOURS)[c] for c in truth.colour[row].tolist() if 0 <= c < UNCOLOURED]
        assert set(coloured) == {thing.colour for thing in scene.objects} - {None}
    assert shown > 100
    assert right > 0.95 * shown


@pytest.mark.skipif(not FONT.exists(), reason="needs the font fonts-noto-color-emoji")
def test_trained_tokenizers_know_the_words_of_the_world(tmp_path: Path) -> None:
    corpus = texts(2000, seed=1)
    train_clip(corpus, tmp_path / "clip")
    train_t5(corpus, tmp_path / "t5")
    caption = "a red apple to the left of a blue star"
    clip, t5 = (load_tokenizer(tmp_path / name).encode([caption, "zebra 北京"]) for name in ("clip", "t5"))
    assert clip.mask.sum(1)[0] == len(caption.split()) + 2
    assert t5.mask.sum(1)[0] == len(caption.split()) + 1
    assert clip.mask.sum(1)[1] > 4


def script(name: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    threads = [] if name in ("write_shards.py", "assemble.py", "train_tokenizers.py") else ["--threads", "1"]
    command = [sys.executable, str(SCRIPTS / name), *arguments, *threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not FONT.exists(), reason="needs the font fonts-noto-color-emoji")
def test_every_script_runs_from_nothing_to_a_picture(tmp_path: Path) -> None:
    build = tmp_path / "build"
    text, latents, shapes = str(build / "text"), str(build / "latents"), str(build / "shards")
    script("write_shards.py", "--stage", "shapes", "--count", "64", "--out", shapes, "--encode-format", "png")
    script("train_vae.py", "--out", str(build / "vae"), "--checkpoints", str(tmp_path / "vae"), "--steps", "2", "--pictures", "48")
    script("train_tokenizers.py", "--out", text, "--count", "500")
    script("train_t5.py", "--text", text, "--out", str(build / "t5"), "--checkpoints", str(tmp_path / "t5"), "--steps", "2", "--batch-size", "4")
    script(
        "train_clip.py", "--text", text, "--out", str(build / "clip"), "--checkpoints", str(tmp_path / "clip"), "--steps", "2", "--batch-size", "4"
    )
    script(
        *("train_image_encoder.py", "--text", text, "--clip", str(build / "clip"), "--out", str(build / "image_encoder")),
        *("--checkpoints", str(tmp_path / "image_encoder"), "--steps", "2", "--batch-size", "4"),
    )
    script("encode_latents.py", "--vae", str(build / "vae"), "--shards", shapes, "--out", latents, "--measure")
    common = ["train_unet.py", "--text", str(build), "--latents", latents, "--batch-size", "8", "--steps", "2"]
    script(*common, "--checkpoints", str(tmp_path / "unet"), "--out", str(build / "unet"))
    script(
        *("train_grounding.py", "--text", str(build), "--parent", str(build / "unet"), "--checkpoints", str(tmp_path / "grounding")),
        *("--out", str(build / "grounded"), "--steps", "2", "--batch-size", "4"),
    )
    fork = ["--parent", str(build / "unet"), "--conditioner", str(build / "grounded"), "--cooldown", "1"]
    script(*common, *fork, "--t-max", "500", "--checkpoints", str(tmp_path / "low"), "--out", str(build / "unet_low"))
    script(*common, *fork, "--t-min", "500", "--checkpoints", str(tmp_path / "high"), "--out", str(build / "unet_high"))
    model = tmp_path / "model"
    script("assemble.py", "--build", str(build), "--experts", "unet_low:0:1.966", "unet_high:1.966:inf", "--out", str(model))
    assert [expert["name"] for expert in json.loads((model / "experts.json").read_text())["experts"]] == ["low", "high"]
    script("evaluate.py", "--model", str(model), "--count", "5", "--steps", "2", "--out", str(tmp_path / "evaluation"))
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert scores["true renders"]["all_ok"] == 1.0
    assert scores["model"]["all_ok"] == 0.0  # two steps of training teach nothing
    with Image.open(tmp_path / "evaluation" / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
