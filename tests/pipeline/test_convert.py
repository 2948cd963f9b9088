"""`tu-diffuse models convert`: number formats, averaged weights, and what a single file cannot say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import write_diffusers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.model.convert import convert
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.training.forking import fork, put_weights

Checkpoint = Callable[[str], tuple[Path, Path]]
UNET = "model.diffusion_model."


def pixels(folder: Path, **settings: str) -> torch.Tensor:
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    return next(event.pixels for event in text_to_image(model, resolve(model.folder, "a", [5], steps=3, **settings)) if isinstance(event, Picture))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_number_formats(checkpoint: Checkpoint, tmp_path: Path, dtype: str):
    _, file = checkpoint("sd1")
    out = tmp_path / "half.safetensors"
    convert(open_folder(file), out, dtype)
    whole, half = load_file(file), load_file(out)
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], tensor.to(getattr(torch, dtype))) for name, tensor in whole.items())
    with safe_open(out, "pt") as opened:
        said = opened.metadata()
    assert (said["modelspec.architecture"], said["modelspec.prediction_type"]) == ("stable-diffusion-v1", "epsilon")
    assert said["modelspec.resolution"] == "32x32"


def test_values_beyond_a_format_are_refused(checkpoint: Checkpoint, tmp_path: Path):
    _, file = checkpoint("sd1")
    save_file(load_file(file) | {f"{UNET}conv_out": torch.ones(1)} | {f"{UNET}out.2.bias": torch.full((4,), 1e6)}, tmp_path / "big.safetensors")
    with pytest.raises(ModelError, match="1 tensors that no Stable Diffusion checkpoint has"):
        open_folder(tmp_path / "big.safetensors")
    save_file(load_file(file) | {f"{UNET}out.2.bias": torch.full((4,), 1e6)}, tmp_path / "big.safetensors")
    with pytest.raises(ModelError, match=r"out\.2\.bias .* beyond the range of float16"):
        convert(open_folder(tmp_path / "big.safetensors"), tmp_path / "half.safetensors", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.safetensors"]


def test_averaged_weights(checkpoint: Checkpoint, tmp_path: Path):
    _, file = checkpoint("sd1")
    tensors = load_file(file)
    average = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor + 1 for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(tensors | average, tmp_path / "full.safetensors")
    convert(open_folder(tmp_path / "full.safetensors"), tmp_path / "ema.safetensors", ema=True)
    convert(open_folder(tmp_path / "full.safetensors"), tmp_path / "plain.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "plain.safetensors").items())
    for name, tensor in load_file(tmp_path / "ema.safetensors").items():
        assert torch.equal(tensor, tensors[name] + (1 if name.startswith(UNET) else 0)), name
    with pytest.raises(UsageError, match="holds no averaged weights"):
        convert(open_folder(file), tmp_path / "other.safetensors", ema=True)


def test_folders_with_experts_stored_as_deltas(sd1_folder: Path, tmp_path: Path):
    noise = open_folder(sd1_folder).noise
    fork(open_folder(sd1_folder), [float(noise.sigma_at(500))], tmp_path / "forked")
    changed = {name: tensor + 0.125 for name, tensor in load_file(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors").items()}
    put_weights(open_folder(tmp_path / "forked"), "t0500-1000", tmp_path / "trained", tensors=changed)
    convert(open_folder(tmp_path / "trained"), tmp_path / "same")
    assert torch.equal(pixels(tmp_path / "same"), pixels(tmp_path / "trained"))
    assert not list((tmp_path / "same").rglob("delta*"))
    convert(open_folder(tmp_path / "trained"), tmp_path / "half", "bfloat16")
    assert {tensor.dtype for path in (tmp_path / "half").rglob("*.safetensors") for tensor in load_file(path).values()} == {torch.bfloat16}
    assert int((pixels(tmp_path / "half").int() - pixels(tmp_path / "trained").int()).abs().max()) <= 32
    with pytest.raises(ModelError, match="cannot be a single file"):
        convert(open_folder(tmp_path / "trained"), tmp_path / "a.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loras_are_added_for_good(checkpoint: Checkpoint, tmp_path: Path, family: str):
    """U-Net and text encoders; folder and single file, in either direction, draw what `--lora` draws."""
    folder, file = checkpoint(family)
    spec = f"{write_diffusers(tmp_path / 'style.safetensors', folder)}:0.3"
    command = [
        "generate",
        "a",
        "--model",
        str(folder),
        "--seed",
        "5",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--sampler",
        "euler",
        "--schedule",
        "leading",
        "--out",
    ]
    assert run([*command, str(tmp_path / "wanted.png"), "--lora", spec]) == 0
    assert run([*command, str(tmp_path / "plain.png")]) == 0
    wanted, plain = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("wanted", "plain"))
    assert (wanted != plain).mean() > 0.5
    for source, name in ((folder, "a"), (folder, "b.safetensors"), (file, "c"), (file, "d.safetensors")):
        assert run(["models", "convert", str(source), "--out", str(tmp_path / name), "--lora", spec]) == 0
        assert np.array_equal(pixels(tmp_path / name, sampler="euler", schedule="leading").numpy(), wanted)


def edited(folder: Path, target: Path, name: str, **values: object) -> Path:
    shutil.copytree(folder, target)
    path = target / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


def test_what_a_single_file_cannot_say_is_refused(checkpoint: Checkpoint, sd1_folder: Path, ensemble_folder: Path, tmp_path: Path):
    folder, _ = checkpoint("sd1")
    out = tmp_path / "a.safetensors"
    cases = [
        ("heads", edited(folder, tmp_path / "1", "unet/config.json", attention_head_dim=4), r"attention_head_dim = \[4, 4, 4\]"),
        ("scale", edited(folder, tmp_path / "2", "vae/config.json", scaling_factor=0.5), r"scaling_factor = 0\.5"),
        ("noise", edited(folder, tmp_path / "3", "scheduler/scheduler_config.json", beta_end=0.02), "another noise schedule"),
        ("activation", edited(folder, tmp_path / "4", "text_encoder/config.json", num_attention_heads=2), "num_attention_heads = 2"),
        ("x0", edited(folder, tmp_path / "5", "scheduler/scheduler_config.json", prediction_type="sample"), "predicts 'sample'"),
        ("tokenizer", edited(folder, tmp_path / "6", "tokenizer/tokenizer_config.json", pad_token="!"), "tokenizer"),
        ("ensemble", ensemble_folder, "cannot be a single file"),
        ("tiny", sd1_folder, "cannot be a single file"),
    ]
    for name, source, message in cases:
        with pytest.raises(ModelError, match=message):
            convert(open_folder(source), out)
        assert not out.exists(), name


def test_the_command(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, file = checkpoint("sd1")
    assert run(["models", "convert", str(folder), "--out", str(tmp_path / "a.safetensors"), "--dtype", "bfloat16", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["path"], line["kind"], line["family"]) == (str(tmp_path / "a.safetensors"), "model", "sd")
    assert {part["dtype"] for part in [*line["parts"], *line["experts"]]} == {"BF16"}
    assert run(["models", "convert", str(folder), "--out", str(tmp_path / "a.safetensors")]) == 2
    assert run(["models", "convert", str(file), "--out", str(tmp_path / "folder"), "--dtype", "int4"]) == 2
    assert "use one of float32, float16, bfloat16" in capsys.readouterr().err
    assert run(["models", "convert", str(file), "--out", str(tmp_path / "folder")]) == 0
    assert torch.equal(pixels(tmp_path / "folder"), pixels(file))
    for out in (tmp_path / "a.safetensors" / "b.safetensors", tmp_path / "a.safetensors" / "folder"):
        assert run(["models", "convert", str(folder), "--out", str(out)]) == 74
    assert "cannot be written" in capsys.readouterr().err
    assert run(["models", "convert", str(tmp_path / "folder"), "--out", str(tmp_path / "b"), "--prediction-type", "v"]) == 2


def test_commands_that_write_models_unpack_a_single_file_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, file = checkpoint("sd1")
    assert run(["experts", "fork", str(file), "--at-timestep", "500", "--out", str(tmp_path / "forked")]) == 0
    [unpacked] = (tmp_path / "cache" / "tu-diffuse" / "unpacked").glob("*/*")
    assert str(unpacked) in capsys.readouterr().err
    assert unpacked.name == file.stem
    assert torch.equal(pixels(tmp_path / "forked"), pixels(file))
    written = unpacked.stat().st_mtime_ns
    assert run(["experts", "fork", str(file), "--at-timestep", "600", "--out", str(tmp_path / "other")]) == 0
    assert unpacked.stat().st_mtime_ns == written
    assert run(["experts", "fork", str(file), "--at-timestep", "600", "--prediction-type", "v", "--out", str(tmp_path / "v")]) == 0
    assert open_folder(tmp_path / "v").noise.prediction_type == "v_prediction"
    assert len(list((tmp_path / "cache" / "tu-diffuse" / "unpacked").glob("*/*"))) == 2
