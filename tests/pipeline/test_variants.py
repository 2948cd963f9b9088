"""`--variant`: of a folder that holds several, the weights that were asked for are drawn with, recorded, described and converted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model

Said = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def call(*arguments: object) -> list[dict[str, Any]]:
        assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.fixture
def both(sd1_folder: Path, tmp_path: Path) -> Path:
    """A folder with plain weights and a variant: the U-Net as diffusers writes it, in shards, the text encoder as one file, and no VAE."""
    folder = shutil.copytree(sd1_folder, tmp_path / "both")
    half = UNet2DConditionModel.from_pretrained(sd1_folder / "unet").half()
    with torch.no_grad():
        half.conv_out.weight.mul_(0.5)
    half.save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")
    text = {name: tensor.half() for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()}
    save_file(text, folder / "text_encoder" / "model.fp16.safetensors", {"format": "pt"})
    return folder


def only(both: Path, to: Path) -> Path:
    """A folder that has the variant alone where there is one."""
    shutil.copytree(both, to)
    (to / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (to / "text_encoder" / "model.safetensors").unlink()
    return to


def test_the_weights_that_were_asked_for(both: Path, sd1_folder: Path, tmp_path: Path, said: Said):
    common = ["a cat", "--seed", 3, "--steps", 2]
    files = dict[str, bytes]()
    for name, model, more in [
        ("plain", sd1_folder, []),
        ("default", both, []),
        ("variant", both, ["--variant", "fp16"]),
        ("offloaded", both, ["--variant", "fp16", "--offload"]),
        ("only", only(both, tmp_path / "only"), []),
    ]:
        [drawn] = said("generate", *common, "--model", model, "--out", tmp_path / f"{name}.png", *more)
        files[name] = torch.tensor(load_pixels(drawn["path"])).numpy().tobytes()
    assert files["plain"] == files["default"] != files["variant"]
    assert files["variant"] == files["offloaded"] == files["only"]
    recorded = {name: read_metadata(tmp_path / f"{name}.png")["model"] for name in files}
    assert [recorded[name].get("variant") for name in files] == [None, None, "fp16", "fp16", None]
    assert recorded["variant"]["hash"] == recorded["offloaded"]["hash"] == recorded["only"]["hash"] != recorded["default"]["hash"]
    assert said("replay", tmp_path / "variant.png", "--model", both)[0]["equal"]
    assert said("replay", tmp_path / "only.png", "--model", tmp_path / "only")[0]["equal"]


def load_pixels(path: str) -> list[int]:
    from PIL import Image

    with Image.open(path) as image:
        return list(image.convert("RGB").tobytes())


def test_a_batch_and_its_workers(both: Path, tmp_path: Path, said: Said):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    arguments = ["batch", tmp_path / "prompts.txt", "--model", both, "--steps", 2, "--batch-size", 1, "--variant", "fp16"]
    alone = [event["path"] for event in said(*arguments, "--out", tmp_path / "a") if event["event"] == "picture"]
    workers = [event["path"] for event in said(*arguments, "--out", tmp_path / "b", "--devices", "cpu,cpu") if event["event"] == "picture"]
    assert sorted(map(load_pixels, alone)) == sorted(map(load_pixels, workers))
    assert read_metadata(Path(alone[0]))["model"]["variant"] == "fp16"
    assert "--variant fp16" in (tmp_path / "a" / "gallery.html").read_text()
    assert said("replay", alone[0], "--model", both)[0]["equal"]


def test_described_and_converted(both: Path, tmp_path: Path, said: Said):
    [plain], [variant] = said("models", "info", both), said("models", "info", both, "--variant", "fp16")
    assert plain["hash"] != variant["hash"]
    assert [facts["experts"][0]["dtype"] for facts in (plain, variant)] == ["F32", "F16"]
    types = {part["name"]: part["dtype"] for part in variant["parts"] if "dtype" in part}
    assert (types["text_encoder"], types["vae"]) == ("F16", "F32")
    said("models", "convert", both, "--variant", "fp16", "--out", tmp_path / "converted")
    came = load_model(open_folder(tmp_path / "converted")).experts.get("unet").unet.conv_out.weight
    wanted = load_model(open_folder(both, variant="fp16")).experts.get("unet").unet.conv_out.weight
    assert torch.equal(came, wanted)
    assert not torch.equal(came, load_model(open_folder(both)).experts.get("unet").unet.conv_out.weight)


def test_diffusers_loads_the_variant_too(both: Path):
    config = json.loads((both / "unet" / "config.json").read_text())
    (both / "unet" / "config.json").write_text(json.dumps(config | {"dual_cross_attention": False, "act_fn": "gelu"}))
    weights = {name: load_model(open_folder(both, variant=name)) for name in (None, "fp16")}
    assert all(model.fallbacks == ("unet-by-diffusers",) for model in weights.values())
    first, second = (model.experts.get("unet").unet.conv_out.weight for model in weights.values())
    torch.testing.assert_close(second, first * 0.5, atol=1e-3, rtol=1e-3)


def test_refusals(both: Path, sd1_folder: Path, tmp_path: Path):
    for folder, variant in ((both, "bf16"), (both, "../fp16"), (both, ""), (sd1_folder, "fp16")):
        with pytest.raises(UsageError, match=r"no part of .* has weights of the variant"):
            open_folder(folder, variant=variant)
    file = tmp_path / "single.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UsageError, match="is a single file"):
        open_folder(file, variant="fp16")
    two = only(both, tmp_path / "two")
    shutil.copy(two / "text_encoder" / "model.fp16.safetensors", two / "text_encoder" / "model.bf16.safetensors")
    with pytest.raises(ModelError, match=r"only variants of its weights \(bf16, fp16\)"):
        open_folder(two)
    assert open_folder(two, variant="bf16").variant == "bf16"
