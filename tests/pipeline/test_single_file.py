"""Single-file checkpoints draw what diffusers draws with the model's folder, and are named, described, recorded and replayed as models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UnsafeError, UsageError
from tu_diffuse.model_files import read_headers, read_weights
from tu_diffuse.pipeline.model.convert import convert
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Progress, text_to_image
from tu_diffuse.text_encoders.clip import clip_state_dict
from tu_diffuse.text_encoders.tokenizer import load_tokenizer

Checkpoint = Callable[[str], tuple[Path, Path]]
PROMPT, SEED, STEPS, GUIDANCE, SIDE = "a red apple, 3 Äpfel!", 11, 4, 4.0, 32
FAMILIES = ["sd1", "sd2", "sdxl", "sdxl-refiner"]


def latents(path: Path, prediction_type: str | None = None) -> Tensor:
    """What Euler's last step ends on."""
    model = load_model(open_folder(path, prediction_type), dtype="float32", device="cpu")
    asked: dict[str, Any] = {"steps": STEPS, "sampler": "euler", "schedule": "leading", "guidance": GUIDANCE, "width": SIDE, "height": SIDE}
    return [event.x0 for event in text_to_image(model, resolve(model.folder, PROMPT, [SEED], **asked)) if isinstance(event, Progress)][-1]


def theirs(pipeline: Any) -> Tensor:
    from diffusers import EulerDiscreteScheduler
    from tiny_models import NOISE

    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", prediction_type=pipeline.scheduler.config.prediction_type)
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", "width": SIDE, "height": SIDE}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **asked).images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_draws_what_diffusers_draws(checkpoint: Checkpoint, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file was written by us; diffusers reads it as the folder that it was made from, and so do we."""
    import diffusers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, file = checkpoint(family)
    got = latents(file)
    assert got.std() > 0.05
    if family != "sdxl-refiner":  # diffusers has no pipeline that starts the refiner from noise; test_composing compares it after a base
        kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
        assert (got - theirs(kind.from_single_file(str(file), config=str(folder), local_files_only=True))).abs().max() <= 1e-4
    convert(open_folder(file), tmp_path / "back")
    parts = [path.name for path in folder.iterdir() if list(path.glob("*.safetensors"))]
    assert parts
    for part in parts:
        (before,), (after,) = ((root / part).glob("*.safetensors") for root in (folder, tmp_path / "back"))
        tidy = clip_state_dict if part.startswith("text_encoder") else dict
        wanted, came = tidy(load_file(before)), tidy(load_file(after))
        assert came.keys() == wanted.keys()
        assert all(torch.equal(came[name], tensor) and came[name].dtype == tensor.dtype for name, tensor in wanted.items())
        ours = read_headers(open_folder(file).path / part)
        assert {name: entry["shape"] for name, entry in ours.items()} == {name: list(tensor.shape) for name, tensor in wanted.items()}
    back = open_folder(tmp_path / "back")
    assert back.configs == open_folder(file).configs
    assert back.defaults == open_folder(file).defaults


def test_the_tokenizer_is_the_one_of_the_folder(checkpoint: Checkpoint):
    from transformers import CLIPTokenizer

    prompts = [
        "",
        "!",
        "a  cat's 2nd <|endoftext|> naïve café",
        "ﬁne ½ ① ΣΊΣΥΦΟΣ 北京 🙂🏽",
        "don't we'll I'm 100.5% (a:1.2) [b] {c}",
        "x" * 900,
        "İstanbul ẞ ǅ",
    ]
    prompts += [chr(first) + chr(first + 7) + " " + chr(2 * first) for first in range(32, 20_000, 61) if not 0xD800 <= 2 * first <= 0xDFFF]
    folder, file = checkpoint("sdxl")
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer.from_pretrained(folder / part)
        assert tokenizer.pad_token == pad
        wanted = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        assert torch.equal(load_tokenizer(open_folder(file).path / part).encode(prompts).ids, wanted)


def altered(file: Path, target: Path, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    save_file(load_file(file) | more, target, metadata=metadata)
    return target


def test_stable_diffusion_2_as_published(checkpoint: Checkpoint, tmp_path: Path):
    """With the tower's last layer, its projection and temperature, buffers of training and averaged weights, none of which is used."""
    _, file = checkpoint("sd2")
    tower = "cond_stage_model.model."
    last = {
        name.replace(".22.", ".23."): torch.full_like(tensor, 7.0)
        for name, tensor in load_file(file).items()
        if f"{tower}transformer.resblocks.22." in name
    }
    assert len(last) == 12
    rest = {f"{tower}text_projection": torch.ones(64, 64), f"{tower}logit_scale": torch.ones(()), "alphas_cumprod": torch.ones(1000)}
    whole = altered(file, tmp_path / "v2-1_768-ema-pruned.safetensors", None, **last, **rest)
    assert torch.equal(latents(whole, "v"), latents(file))
    assert open_folder(whole).noise.prediction_type == "epsilon"
    assert (latents(whole) - latents(file)).abs().max() > 1e-2


def test_what_is_predicted_is_told_by_flag_or_file_and_recorded(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, file = checkpoint("sd1")
    silent, says_v = altered(file, tmp_path / "silent.safetensors"), altered(file, tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    predicted = [open_folder(path, said).noise.prediction_type for path in (file, silent, says_v) for said in (None, "v", "epsilon")]
    assert predicted == ["epsilon", "v_prediction", "epsilon", "epsilon", "v_prediction", "epsilon", "v_prediction", "v_prediction", "epsilon"]
    assert open_folder(silent).fingerprint != open_folder(silent, "v").fingerprint
    shutil.copyfile(silent, tmp_path / "renamed.safetensors")
    assert open_folder(tmp_path / "renamed.safetensors").fingerprint == open_folder(silent).fingerprint
    with pytest.raises(UsageError, match="is not known; use one of epsilon, v"):
        open_folder(silent, "x0")
    with pytest.raises(UsageError, match="is for single-file checkpoints"):
        open_folder(checkpoint("sd1")[0], "v")

    asked = ["--model", str(silent), "--steps", "2", "--width", "32", "--height", "32", "--dtype", "float32", "--device", "cpu", "--json"]
    assert run(["generate", "a star", *asked, "--seed", "3", "--out", str(tmp_path / "v.png"), "--prediction-type", "v"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["model"]["name"], settings["model"]["prediction_type"]) == ("silent.safetensors", "v_prediction")
    assert settings["model"]["hash"] == open_folder(silent, "v").fingerprint
    assert run(["generate", "a star", *asked, "--seed", "3", "--out", str(tmp_path / "e.png")]) == 0
    with Image.open(tmp_path / "v.png") as one, Image.open(tmp_path / "e.png") as other:
        assert one.tobytes() != other.tobytes()
    capsys.readouterr()
    for name in ("v.png", "e.png"):
        assert run(["replay", str(tmp_path / name), "--model", str(silent), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["equal"] is True
    assert run(["replay", str(tmp_path / "v.png"), "--model", str(file), "--json"]) == 2


def test_info_and_batch(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, file = checkpoint("sd1")
    assert run(["info", str(file), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert run(["info", str(folder), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert ours["name"] == file.name
    assert (ours["family"], ours["prediction"], ours["parameters"]) == (wanted["family"], wanted["prediction"], wanted["parameters"])
    assert ours["megabytes"] == pytest.approx(file.stat().st_size / 1e6, abs=0.3)
    assert [part["megabytes"] for part in ours["parts"]] == pytest.approx([part["megabytes"] for part in wanted["parts"]], abs=0.1)
    assert run(["experts", "show", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"][0]["stored"] == "whole"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na moon\n")
    asked = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu", "--seed", "1", "--json"]
    assert run(["batch", str(prompts), "--model", str(file), "--out", str(tmp_path / "out"), *asked]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == 2
    assert f"--model {file.name} --prediction-type epsilon" in (tmp_path / "out" / "gallery.html").read_text()
    again = ["batch", str(prompts), "--model", str(file), "--out", str(tmp_path / "out"), *asked]
    assert [run(again), json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"]] == [0, 0]
    assert [run([*again, "--prediction-type", "v"]), json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"]] == [0, 2]  # another model
    for picture in (tmp_path / "out").glob("0*.png"):
        assert run(["replay", str(picture), "--model", str(file)]) == 0


def test_pickles_strangers_and_damage_are_refused(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, file = checkpoint("sd1")
    for suffix in (".ckpt", ".pt", ".bin"):
        (tmp_path / f"model{suffix}").write_bytes(b"\x80\x02.")
        with pytest.raises(UnsafeError, match="pickle"):
            open_folder(tmp_path / f"model{suffix}")
        for command in (
            ["generate", "a", "--model"],
            ["info"],
            ["models", "info"],
            ["finetune", "--shards", "x", "--steps", "1", "--out", str(tmp_path / "o"), "--model"],
        ):
            assert run([*command, str(tmp_path / f"model{suffix}")]) == 3, command
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is not a model"):
        open_folder(tmp_path / "model.gguf")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(open_folder(cut))
    broken = altered(file, tmp_path / "nan.safetensors", None, **{"first_stage_model.decoder.conv_out.bias": torch.full((3,), float("nan"))})
    with pytest.raises(ModelError, match=r"decoder\.conv_out\.bias .* NaN"):
        load_model(open_folder(broken))
    lacking = {name: tensor for name, tensor in load_file(file).items() if name != "model.diffusion_model.time_embed.2.bias"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    model = load_model(open_folder(tmp_path / "lacking.safetensors"))
    with pytest.raises(ModelError, match=r"1 missing: time_embedding\.linear_2\.bias"):
        model.experts.get("unet")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_weights_stay_in_the_file(checkpoint: Checkpoint, family: str):
    _, file = checkpoint(family)
    states = [read_weights(open_folder(file).path / part) for part in ("unet", "vae", "text_encoder")]
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    addresses = [tensor.data_ptr() for state in states for tensor in state.values()]
    assert all(any(int(low, 16) <= address < int(high, 16) for low, high in ranges) for address in addresses)


def test_a_folder_refuses_the_option(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]):
    folder, _ = checkpoint("sd1")
    assert run(["generate", "a", "--model", str(folder), "--prediction-type", "v"]) == 2
    assert "is for single-file checkpoints" in capsys.readouterr().err


def test_an_inpainting_file(checkpoint: Checkpoint, tmp_path: Path):
    """Nine input channels, those of mask and masked picture without effect: it repaints as the file that it was made from."""
    _, file = checkpoint("sd1")
    weight = load_file(file)["model.diffusion_model.input_blocks.0.0.weight"]
    wide = torch.cat([weight, torch.zeros(len(weight), 5, 3, 3)], dim=1)
    nine = altered(file, tmp_path / "nine.safetensors", None, **{"model.diffusion_model.input_blocks.0.0.weight": wide})
    model = open_folder(nine)
    assert (model.inpaints, model.channels) == (True, 4)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "picture.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    asked = ["--steps", "4", "--width", "32", "--height", "32", "--seed", "3", "--strength", "0.75", "--device", "cpu"]
    asked += ["--init-image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]
    pixels: list[bytes] = []
    for number, path in enumerate((nine, file)):
        assert run(["generate", "a star", "--model", str(path), *asked, "--out", str(tmp_path / f"{number}.png")]) == 0
        with Image.open(tmp_path / f"{number}.png") as picture:
            pixels.append(picture.tobytes())
    assert pixels[0] == pixels[1]
