"""`--offload`: the same files bit for bit, weights in memory for one layer at a time, refused with a reason where it cannot be."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import write_diffusers
from safetensors.torch import load_file, save_file
from torch import nn
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.offload import changed, device_of, offloaded, present
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_codec, load_experts, load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.model.readers import load_texts
from tu_diffuse.text_encoders.encode import encode_clip_t5
from tu_diffuse.text_encoders.parts import ClipT5Part
from tu_diffuse.unet.lora import LowRank, adapted
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.codec import FLOAT32_RETRY, LatentCodec
from tu_diffuse.vae.config import AutoencoderConfig
from tu_diffuse.weights import without_storage

CPU = torch.device("cpu")


def half(folder: Path, to: Path) -> Path:
    """A copy of a model folder whose weights are float16, as most checkpoints come; computing in float32 then makes tensors of its own."""
    shutil.copytree(folder, to)
    for path in to.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return to


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[bytes, bytes]]:
    def call(*arguments: object) -> tuple[bytes, bytes]:
        """The picture files of `generate`, without and with --offload."""
        for name, more in (("plain.png", []), ("offloaded.png", ["--offload"])):
            assert run(["generate", *map(str, arguments), "--out", str(tmp_path / name), *more]) == 0, capsys.readouterr().err
        return (tmp_path / "plain.png").read_bytes(), (tmp_path / "offloaded.png").read_bytes()

    return call


@pytest.mark.parametrize(
    ("fixture", "dtype"), [("sd2_folder", "float32"), ("sdxl_folder", "bfloat16"), ("refiner_folder", "float16"), ("ensemble_folder", "float32")]
)
def test_the_same_files(request: pytest.FixtureRequest, tmp_path: Path, fixture: str, dtype: str, files: Callable[..., tuple[bytes, bytes]]):
    folder = half(request.getfixturevalue(fixture), tmp_path / "half")
    plain, waiting = files("a red apple", "--model", folder, "--seed", 3, "--steps", 3, "--dtype", dtype)
    assert plain == waiting
    assert run(["replay", str(tmp_path / "plain.png"), "--model", str(folder), "--offload"]) == 0


def test_the_same_files_with_what_changes_networks(sd1_folder: Path, tmp_path: Path, files: Callable[..., tuple[bytes, bytes]]):
    """A LoRA in the U-Net and the text encoder, an embedding, and networks whose convolutions look around the edge."""
    lora = write_diffusers(tmp_path / "style.safetensors", sd1_folder)
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "word.safetensors")
    common = ["--model", half(sd1_folder, tmp_path / "half"), "--seed", 3, "--steps", 2]
    pictures = dict[str, bytes]()
    changes = {"none": [], "lora": ["--lora", f"{lora}:0.7"], "embedding": ["--embedding", tmp_path / "word.safetensors"], "tile": ["--tile", "xy"]}
    for name, arguments in changes.items():
        plain, waiting = files("a word", *common, *arguments)
        assert plain == waiting, name
        pictures[name] = plain
        for picture in tmp_path.glob("*.png"):
            picture.unlink()
    assert len(set(pictures.values())) == len(changes)  # each of them does something


def test_the_same_files_of_a_batch_whether_stopped_or_not(ensemble_folder: Path, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a bird", "seed": 4, "steps": 2}\n')
    for out, more in (("plain", []), ("offloaded", ["--offload"])):
        assert run(["batch", str(tmp_path / "prompts.jsonl"), "--model", str(ensemble_folder), "--out", str(tmp_path / out), *more]) == 0
    plain, waiting = ({path.name: path.read_bytes() for path in (tmp_path / out).glob("0*.png")} for out in ("plain", "offloaded"))
    assert len(plain) == 2
    assert plain == waiting
    first = min((tmp_path / "plain").glob("0*.png"))
    first.unlink()
    assert run(["batch", str(tmp_path / "prompts.jsonl"), "--model", str(ensemble_folder), "--out", str(tmp_path / "plain"), "--offload"]) == 0
    assert first.read_bytes() == waiting[first.name]  # drawn where it was missing; the others were taken for what they are


def storage(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.parameters() if not tensor.is_meta)


def layers(network: nn.Module) -> Iterator[nn.Module]:
    return (module for module in network.modules() if list(module.parameters(recurse=False)))


@torch.no_grad()
def test_one_layer_is_in_memory_at_a_time(ensemble_folder: Path, tmp_path: Path):
    folder = open_folder(half(ensemble_folder, tmp_path / "half"))
    model = load_model(folder, offload=True)
    place = choose_place(offload=True)
    parts = load_texts(folder, place)["low"]
    assert isinstance(parts, ClipT5Part)
    seen = list[tuple[int, int]]()

    def watch(network: nn.Module) -> nn.Module:
        assert storage(network) == 0
        for layer in layers(network):
            inner = vars(layer)["_old_forward"]

            def forward(*args: Any, inner: Any = inner, layer: nn.Module = layer, **named: Any) -> Any:
                own = sum(tensor.nbytes for tensor in layer.parameters(recurse=False))
                seen.append((storage(network), own))
                return inner(*args, **named)

            vars(layer)["_old_forward"] = forward
        return network

    denoiser = model.experts.get("low")
    networks = [watch(network) for network in (denoiser.unet, parts.clip.model, parts.t5.model)]
    told = encode_clip_t5(["a cat"], parts).conditioning
    denoiser(torch.randn(1, 8, 16, 16), torch.ones(1), told)
    assert len(seen) >= sum(1 for network in networks for _ in layers(network))
    assert all(there == own > 0 for there, own in seen)
    assert [storage(network) for network in networks] == [0, 0, 0]

    codec, _ = load_codec(folder, place)
    whole = sum(tensor.nbytes for tensor in codec.vae.parameters())
    assert storage(codec.vae) == 0
    with present(codec.vae):
        assert storage(codec.vae) == whole
    assert storage(codec.vae) == 0
    codec.decode(torch.randn(1, 8, 16, 16))
    assert storage(codec.vae) == 0


@pytest.mark.parametrize("upcast", [True, False])
def test_a_picture_that_overflows_is_made_again_in_float32(upcast: bool):
    """With force_upcast the whole VAE computes in float32, as it does in memory; without, what overflowed is computed again."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8, force_upcast=upcast, **blocks)
    plain = Autoencoder(config).eval().requires_grad_(False)
    plain.decoder.up_blocks[-1].resnets[-1].conv2.bias.fill_(6e4)
    plain.decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(3e5)
    stored = {name: tensor.clone() for name, tensor in plain.half().state_dict().items()}
    waiting = offloaded(without_storage(lambda: Autoencoder(config)), stored, Path("here"), CPU, torch.float16, whole=True)
    latents = torch.randn(2, 4, 8, 8)
    wanted, came = LatentCodec(plain).decode(latents), LatentCodec(waiting).decode(latents)
    assert wanted.fallbacks == came.fallbacks == ((() if upcast else (FLOAT32_RETRY,)),) * 2
    assert torch.equal(wanted.pixels, came.pixels)
    assert wanted.pixels.std() > 0
    assert storage(waiting) == 0


def test_a_change_shares_what_waits_and_leaves_the_original():
    stored = {"0.weight": torch.randn(3, 4), "0.bias": torch.randn(3)}
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(4, 3))
    network = offloaded(network, stored, Path("here"), CPU, torch.float32)
    x, pair = torch.randn(2, 4), LowRank(torch.randn(2, 4), torch.randn(3, 2), 0.5)
    twice = adapted(adapted(network, {"0": [pair]}), {"0": [pair]})
    assert torch.equal(network(x), nn.functional.linear(x, stored["0.weight"], stored["0.bias"]))
    torch.testing.assert_close(twice(x), x @ (stored["0.weight"] + pair.up @ pair.down).T + stored["0.bias"])
    assert device_of(twice) == CPU
    longer = changed(network, {"0.weight": lambda weight: torch.cat([weight, weight]), "0.bias": lambda bias: torch.cat([bias, bias])})
    assert longer.get_parameter("0.weight").shape == (6, 4)
    torch.testing.assert_close(longer(x), network(x).repeat(1, 2))


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"0.weight": torch.ones(3, 4)}, "1 missing: 0.bias"),
        ({"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3)}, "of another shape"),
        ({"0.weight": torch.ones(3, 4), "0.bias": torch.tensor([0.0, float("nan"), 0.0])}, "0.bias in here holds NaN"),
    ],
)
def test_bad_weights_are_refused_at_once(stored: dict[str, torch.Tensor], said: str):
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ModelError, match=said):
        offloaded(network, stored, Path("here"), CPU, torch.float32)


def test_refusals(sd1_folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--offload and --quantize int8 contradict each other"):
        choose_place(quantize="int8", offload=True)
    foreign = shutil.copytree(sd1_folder, tmp_path / "foreign")
    config = json.loads((foreign / "unet" / "config.json").read_text())
    (foreign / "unet" / "config.json").write_text(json.dumps(config | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}))
    with pytest.raises(UsageError, match="--offload is for U-Nets of ours"):
        load_experts(open_folder(foreign), choose_place(offload=True))
