"""ControlNets: what diffusers' pipelines draw with them, recorded and refused as everything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_networks import control_network
from parity import latents
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tu_diffuse.batch.items import make_items
from tu_diffuse.batch.lines import Line
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, TuDiffuseError, UnsafeError, UsageError
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.resolve import resolve


@pytest.fixture(scope="module")
def control(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return control_network(sd1_folder, tmp_path_factory.mktemp("control") / "edges")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "map.png"
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 6:20] = 255
    Image.fromarray(pixels).save(path)
    return path


def _latents(folder: Path, **asked: Any) -> Tensor:
    return latents(folder, seeds=[11], steps=6, guidance=4.0, sampler="euler", schedule="leading", **asked)


def _wanted(kind: str, folder: Path, network: Path, picture: Path, **asked: Any) -> Tensor:
    import diffusers

    net = diffusers.ControlNetModel.from_pretrained(network)
    pipeline = getattr(diffusers, kind).from_pretrained(folder, controlnet=net, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shared: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**shared, timestep_spacing="leading")
    return pipeline(
        "a red apple",
        image=Image.open(picture),
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **asked,
    ).images


def test_sd_latents_equal_diffusers(sd1_folder: Path, control: Path, picture: Path):
    plain = _latents(sd1_folder)
    for scale, start, end in ((1.0, 0.0, 1.0), (0.5, 0.2, 0.7)):
        wanted = _wanted(
            "StableDiffusionControlNetPipeline",
            sd1_folder,
            control,
            picture,
            controlnet_conditioning_scale=scale,
            control_guidance_start=start,
            control_guidance_end=end,
        )
        asked: dict[str, Any] = {"control_image": picture, "control_model": control}
        got = _latents(sd1_folder, **asked, control_scale=scale, control_start=start, control_end=end)
        difference = float((got - wanted).abs().max())
        print(f"scale {scale}: {difference:.1e} of {float(wanted.abs().max()):.1f}")
        assert difference <= 1e-4
        assert (got - plain).abs().max() > 1e-3


def test_sdxl_latents_equal_diffusers(sdxl_folder: Path, picture: Path, tmp_path: Path):
    network = control_network(sdxl_folder, tmp_path / "xl")
    wanted = _wanted("StableDiffusionXLControlNetPipeline", sdxl_folder, network, picture, controlnet_conditioning_scale=1.0)
    got = _latents(sdxl_folder, control_image=picture, control_model=network)
    print(f"{float((got - wanted).abs().max()):.1e}")
    assert (got - wanted).abs().max() <= 1e-4
    assert (got - _latents(sdxl_folder)).abs().max() > 1e-3


def test_edges_are_opencvs(sd1_folder: Path, control: Path, picture: Path, tmp_path: Path):
    """Canny of the picture is the drawing with its edges given as they are."""
    cv2 = pytest.importorskip("cv2")
    edges = cv2.Canny(np.asarray(Image.open(picture)), 100, 200)
    assert 0 < (edges > 0).mean() < 0.5
    Image.fromarray(edges).save(tmp_path / "edges.png")
    by_us = _latents(sd1_folder, control="canny", control_image=picture, control_model=control)
    assert torch.equal(by_us, _latents(sd1_folder, control_image=tmp_path / "edges.png", control_model=control))
    assert (by_us - _latents(sd1_folder, control_image=picture, control_model=control)).abs().max() > 1e-4


def test_batch_and_replay(sd1_folder: Path, control: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, out = picture.with_name("prompts.jsonl"), tmp_path / "out"
    shutil.copytree(control, picture.parent / "edges", dirs_exist_ok=True)
    lines = [{"prompt": "a", "seed": 1, "steps": 3, "control_image": "map.png", "control_model": "edges"}, {"prompt": "a", "seed": 1, "steps": 3}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ["--model", str(sd1_folder), "--device", "cpu"]
    assert run(["batch", str(file), "--out", str(out), *shared]) == 0
    first, second = sorted(out.glob("*.png"))[:2]
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    assert run(["replay", str(first), "--model", str(sd1_folder)]) == 0
    alone = tmp_path / "alone.png"
    asked = ["--steps", "3", "--control-image", str(picture), "--control-model", str(control), "--seed", "1"]
    assert run(["generate", "a", "--out", str(alone), *asked, *shared]) == 0
    assert str(tmp_path).encode() not in alone.read_bytes()
    assert np.abs(np.asarray(Image.open(alone)).astype(int) - np.asarray(Image.open(first))).max() <= 2
    replayed = ["replay", str(alone), "--model", str(sd1_folder), "--input", str(picture)]
    assert run(replayed) == 2
    assert "the ControlNet 'edges'" in capsys.readouterr().err
    assert run([*replayed, "--control-model", str(control)]) == 0
    assert "equal" in capsys.readouterr().out


def test_the_key_knows_network_and_picture(sd1_folder: Path, control: Path, picture: Path):
    folder, line = open_folder(sd1_folder), {"prompt": "a", "seed": 1, "control_image": str(picture), "control_model": str(control)}

    def key(**more: Any) -> str:
        made, problems = make_items(folder, [Line(1, line | more, {})], defaults={}, sweep={}, circumstances={})
        assert not problems
        return made[0].key

    assert len({key(), key(control_scale=0.5), key(control_start=0.1), key(control_end=0.9), key(control_image=None, control_model=None)}) == 5


def test_what_cannot_be_is_refused(sd1_folder: Path, ensemble_folder: Path, control: Path, picture: Path, tmp_path: Path):
    folder, both = open_folder(sd1_folder), {"control_image": picture, "control_model": control}
    cases: list[tuple[dict[str, Any], type[TuDiffuseError], str]] = [
        ({"control_image": picture}, UsageError, "--control-image needs --control-model"),
        ({"control_model": control}, UsageError, "--control-model needs --control-image"),
        ({"control": "canny"}, UsageError, "--control needs --control-image"),
        ({**both, "control": "pose"}, UsageError, "--control 'pose' is not computed here"),
        ({**both, "control": "depth"}, UsageError, "--control depth needs --control-depth-model"),
        ({**both, "control_depth_model": control}, UsageError, "--control-depth-model needs --control depth"),
        ({**both, "control_start": 0.91, "control_end": 0.95}, UsageError, "leave none of 30 steps"),
        ({**both, "control_scale": -1.0}, UsageError, "--control-scale -1 is out of range"),
        ({**both, "tile": "x"}, UsageError, "--tile cannot be used together"),
        ({**both, "control_model": tmp_path}, UsageError, "no folder with a config.json"),
        ({**both, "control_model": sd1_folder / "unet"}, UnsafeError, "only ControlNetModel is run here"),
    ]
    for asked, error, said in cases:
        with pytest.raises(error, match=said):
            resolve(folder, "a", [1], **asked)
    with pytest.raises(UsageError, match="another family"):
        resolve(open_folder(ensemble_folder), "a", [1], **both)
    changed = shutil.copytree(control, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    for change, error, said in (
        ({"block_out_channels": [8, 8]}, ModelError, "block_out_channels"),
        ({"conditioning_embedding_out_channels": None}, ModelError, "8×8 pixels"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, UnsafeError, "custom code"),
    ):
        (changed / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=said):
            resolve(folder, "a", [1], **both | {"control_model": changed})
    (changed / "config.json").write_text(json.dumps(config))
    torch.save(load_file(changed / "diffusion_pytorch_model.safetensors"), changed / "diffusion_pytorch_model.bin")
    (changed / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UnsafeError, match="pickle"):
        resolve(folder, "a", [1], **both | {"control_model": changed})
