"""`--quantize int8`: less memory, nearly the same pictures, recorded, and refused with a reason where it cannot be."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import write_diffusers
from PIL import Image
from torch import nn
from tu_diffuse.cli.main import run
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.model.quantize import check_quantize, quantized
from tu_diffuse.pipeline.model.readers import load_texts
from tu_diffuse.text_encoders.parts import ClipT5Part
from tu_diffuse.unet.lora import LowRank, adapted, with_pairs

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

Said = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def call(*arguments: object) -> list[dict[str, Any]]:
        assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_what_rounding_to_256_levels_gives(dtype: torch.dtype):
    layer = nn.Linear(64, 32).to(dtype).requires_grad_(False)
    weight, x = layer.weight.double(), torch.randn(5, 64, dtype=dtype)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    expected = x.double() @ ((weight / scale).round().clamp(-128, 127) * scale).T + layer.bias.double()
    came = quantized(layer, "int8")(x)
    assert came.dtype == dtype
    torch.testing.assert_close(came.double(), expected, atol=0.02 if dtype == torch.bfloat16 else 2e-3, rtol=0.02)
    assert (came.double() - (x.double() @ weight.T + layer.bias.double())).abs().max() > 1e-4  # and not the weights themselves


@needs_torchao
def test_every_linear_layer_of_text_encoders_and_experts_is_small(ensemble_folder: Path):
    folder = open_folder(ensemble_folder)
    plain, small = (load_model(folder, quantize=kind) for kind in ("none", "int8"))
    for name in ("high", "low"):
        wide, narrow = plain.experts.get(name).unet, small.experts.get(name).unet
        linear = [module for module in narrow.modules() if isinstance(module, nn.Linear)]
        assert len(linear) > 20
        assert all(module.weight.qdata.dtype == torch.int8 for module in linear)
        assert [p.shape for p in narrow.parameters()] == [p.shape for p in wide.parameters()]
        assert torch.equal(narrow.conv_in.weight, wide.conv_in.weight)
    parts = load_texts(folder, choose_place(quantize="int8"))["low"]
    assert isinstance(parts, ClipT5Part)
    towers = [parts.clip.model, parts.load_t5().model]
    assert all(module.weight.qdata.dtype == torch.int8 for tower in towers for module in tower.modules() if isinstance(module, nn.Linear))


@needs_torchao
def test_pictures_are_near_recorded_and_drawn_again(ensemble_folder: Path, tmp_path: Path, said: Said):
    common = ["--model", ensemble_folder, "--seed", 3]
    [plain] = said("generate", "a cat", *common, "--out", tmp_path / "a.png")
    [small] = said("generate", "a cat", *common, "--quantize", "int8", "--out", tmp_path / "b.png")
    difference = np.abs(pixels(plain["path"]) - pixels(small["path"]))
    assert 0 < difference.mean() < 8
    assert (plain["settings"]["quantize"], small["settings"]["quantize"]) == ("none", "int8")
    for line in (plain, small):
        assert said("replay", line["path"], "--model", ensemble_folder)[0]["equal"]


@needs_torchao
def test_a_batch(ensemble_folder: Path, tmp_path: Path, said: Said):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    arguments = ["batch", tmp_path / "prompts.txt", "--model", ensemble_folder, "--out", tmp_path / "out"]
    small = [event for event in said(*arguments, "--quantize", "int8") if event["event"] == "picture"]
    assert "--quantize int8" in (tmp_path / "out" / "gallery.html").read_text()  # in the commands that it gives
    plain = [event for event in said(*arguments) if event["event"] == "picture"]
    assert (len(small), len(plain)) == (2, 2)  # other pictures, not taken for those that are there
    assert any((pixels(a["path"]) != pixels(b["path"])).any() for a, b in zip(small, plain, strict=True))
    assert said("replay", small[0]["path"], "--model", ensemble_folder)[0]["equal"]


def test_refusals(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="--quantize 'int3' is not known"):
        choose_place(quantize="int3")
    with pytest.raises(UsageError, match="cannot be used on mps"):
        check_quantize("int8", torch.device("mps"))
    monkeypatch.setattr("tu_diffuse.pipeline.model.quantize.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="torchao, which is not installed"):
        choose_place(quantize="int8")
    assert choose_place().quantize == "none"


@needs_torchao
def test_a_lora_is_added_before_the_weights_are_quantized(sd1_folder: Path, tmp_path: Path, said: Said):
    """The oracle is the model into which `models convert` baked the LoRA, in U-Net and text encoder."""
    lora = write_diffusers(tmp_path / "style.safetensors", sd1_folder)
    said("models", "convert", sd1_folder, "--out", tmp_path / "baked", "--lora", f"{lora}:0.7")
    common = ["--seed", 3, "--quantize", "int8", "--steps", 4]
    [baked] = said("generate", "a cat", "--model", tmp_path / "baked", *common, "--out", tmp_path / "a.png")
    [added] = said("generate", "a cat", "--model", sd1_folder, *common, "--lora", f"{lora}:0.7", "--out", tmp_path / "b.png")
    [none] = said("generate", "a cat", "--model", sd1_folder, *common, "--out", tmp_path / "c.png")
    [exact] = said("generate", "a cat", "--model", tmp_path / "baked", *common[:2], *common[4:], "--out", tmp_path / "d.png")
    assert (pixels(added["path"]) == pixels(baked["path"])).all()
    assert all((pixels(added["path"]) != pixels(other["path"])).any() for other in (none, exact))
    assert said("replay", added["path"], "--model", sd1_folder, "--lora", lora)[0]["equal"]


@needs_torchao
def test_lines_of_a_batch_swap_loras_over_integers(sd1_folder: Path, tmp_path: Path, said: Said):
    lora = write_diffusers(tmp_path / "style.safetensors", sd1_folder)
    loras = [f"{lora}:0.7", f"{lora}:0", f"{lora}:-0.7"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "a cat", "lora": [one], "seed": 3, "steps": 4}) + "\n" for one in loras))
    arguments = ["batch", tmp_path / "prompts.jsonl", "--model", sd1_folder, "--out", tmp_path / "out", "--quantize", "int8", "--batch-size", 1]
    drawn = {event["line"]: pixels(event["path"]) for event in said(*arguments) if event["event"] == "picture"}
    [alone] = said("generate", "a cat", "--model", sd1_folder, "--seed", 3, "--quantize", "int8", "--steps", 4, "--out", tmp_path / "a.png")
    assert (drawn[2] == pixels(alone["path"])).all()  # between two that change everything
    assert len({drawn[line].tobytes() for line in (1, 2, 3)}) == 3


@needs_torchao
def test_a_lora_needs_the_weights_that_the_integers_were_made_of():
    stored = {"0.weight": torch.randn(32, 64), "0.bias": torch.randn(32)}
    pairs = {"0": [LowRank(torch.randn(2, 64), torch.randn(32, 2), 0.5)]}

    def network(weight: torch.Tensor) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(64, 32))
        made.load_state_dict({**stored, "0.weight": weight})
        return made.requires_grad_(False)

    x = torch.randn(5, 64)
    twice = adapted(adapted(quantized(network(stored["0.weight"]), "int8", stored), pairs), pairs)
    merged = with_pairs(with_pairs(stored["0.weight"], pairs["0"]), pairs["0"])
    assert torch.equal(twice(x), quantized(network(merged), "int8")(x))
    assert not torch.equal(twice(x), network(merged)(x))
    with pytest.raises(UsageError, match="leave out --quantize"):
        adapted(quantized(network(stored["0.weight"]), "int8"), pairs)
