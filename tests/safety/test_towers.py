"""Text encoders that are brought to a model (`models add-t5`, `models use-clip`): pickles, and configs that cannot be."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import live_pickles
import pytest
from safety_scenes import Scene, bounded, put
from tu_diffuse.cli.main import run

T5_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CLIP = {"model_cfg": {"embed_dim": 16, "text_cfg": {"context_length": 16, "vocab_size": 514, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.0}}}
ODD: tuple[Any, ...] = (-1, 10**30, math.nan, "16")


def t5_folder(whole: Scene, folder: Path) -> Path:
    folder.mkdir()
    for part in ("text_encoder_2", "tokenizer_2"):
        for path in (whole.model / part).iterdir():
            shutil.copyfile(path, folder / path.name)
    return folder


def ends(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> int:
    with bounded(megabytes=1024):
        code = run([str(argument) for argument in arguments])
    assert "with --debug" not in capsys.readouterr().err
    return code


@pytest.mark.parametrize("name", [*T5_FILES, "pytorch_model.bin", "spiece.model"])
def test_pickles_in_a_t5(whole: Scene, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    t5 = t5_folder(whole, tmp_path / "t5")
    (tmp_path / "canaries").mkdir()
    if name not in T5_FILES:
        (t5 / {"pytorch_model.bin": "model.safetensors", "spiece.model": "tokenizer.json"}[name]).unlink()
    for number, data in enumerate(list(live_pickles.fixtures(tmp_path / "canaries").values())[::9]):
        put(t5 / name, data)
        assert ends(["models", "add-t5", sd1_folder, "--t5", t5, "--out", tmp_path / str(number)], capsys) in (3, 4)
    assert os.listdir(tmp_path / "canaries") == []


def test_a_good_t5_is_taken(whole: Scene, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The control."""
    assert ends(["models", "add-t5", sd1_folder, "--t5", t5_folder(whole, tmp_path / "t5"), "--out", tmp_path / "out"], capsys) == 0


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_pickles_in_a_clip(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    put(tmp_path / "clip" / "open_clip_config.json", CLIP)
    (tmp_path / "canaries").mkdir()
    for number, data in enumerate(list(live_pickles.fixtures(tmp_path / "canaries").values())[::9]):
        put(tmp_path / "clip" / name, data)
        arguments = ["models", "use-clip", sd1_folder, "--clip", f"local-dir:{tmp_path / 'clip'}", "--out", tmp_path / str(number)]
        assert ends(arguments, capsys) in (3, 4)
    assert os.listdir(tmp_path / "canaries") == []


def test_configs_of_a_clip(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads(json.dumps(CLIP))
    for holder in (config["model_cfg"], config["model_cfg"]["text_cfg"]):
        for name in [*holder, "quick_gelu", "pool_type"]:
            for odd in ODD:
                good = holder.get(name)
                holder[name] = odd
                put(tmp_path / "clip" / "open_clip_config.json", config)
                arguments = ["models", "use-clip", sd1_folder, "--clip", f"local-dir:{tmp_path / 'clip'}", "--out", tmp_path / "out"]
                assert ends(arguments, capsys) in (2, 4), (name, odd)
                holder[name] = good
