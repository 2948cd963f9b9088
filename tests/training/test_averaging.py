"""`tu-diffuse finetune --ema-posthoc` and `average`: from a run's snapshots to a model folder, on tiny models."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.training import posthoc
from tu_diffuse.training.checkpoints import load_newest
from world import STAGES
from write_shards import write_shard

STEPS, EVERY = 12, 2


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shard(tmp_path_factory.mktemp("shards"), 0, 12, STAGES["shapes"], 5, "png"))


def tuned(model: Path, shard: str, out: Path, *more: str) -> Path:
    common = ["--batch-size", "2", "--resolution", "32", "--lr", "1e-2", "--workers", "0", "--threads", "1", "--device", "cpu"]
    files = ["--model", str(model), "--shards", shard, "--out", str(out)]
    assert run(["finetune", *files, *common, "--steps", str(STEPS), "--ema-posthoc", str(EVERY), "--save-every", "8", *more]) == 0
    return out


def averaged(tuned: Path, model: Path, width: str, out: Path, *more: str) -> int:
    return run(["average", str(tuned), "--model", str(model), "--sigma-rel", width, "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(sd1_folder: Path, shard: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(sd1_folder, shard, tmp_path_factory.mktemp("run") / "run")


def unet(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def tracked(run: Path, width: str) -> dict[str, Tensor]:
    """The average of the U-Net that the run's last checkpoint holds."""
    found, prefix = load_newest(run / "checkpoints"), f"{width}/unets.unet."
    assert found is not None
    return {name.removeprefix(prefix): tensor for name, tensor in found.power_averages.items() if name.startswith(prefix)}


def moved(one: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(tensor.double() - start[name].double()).flatten() for name, tensor in one.items()])


def test_a_kept_width_is_the_average_of_the_checkpoint(sd1_folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert averaged(whole, sd1_folder, "0.1", tmp_path / "made", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("distance") < 1e-6
    assert told == {"path": str(tmp_path / "made"), "step": STEPS, "sigma_rel": 0.1, "snapshots": 12, "lora": []}
    wanted = tracked(whole, "0.10")
    made, start, last = unet(tmp_path / "made"), unet(sd1_folder), unet(whole / "model")
    assert made.keys() == wanted.keys() == start.keys()
    change = moved(wanted, start)
    assert (moved(made, start) - change).norm() < 1e-3 * change.norm()
    assert (moved(last, start) - change).norm() > 0.05 * change.norm()
    model = load_model(open_folder(tmp_path / "made"))
    [picture] = [event for event in text_to_image(model, resolve(model.folder, "a red star", [1], steps=2)) if isinstance(event, Picture)]
    assert picture.pixels.float().std() > 1


def test_another_width_is_the_average_tracked_directly(sd1_folder: Path, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that tracks 0.07 beside the others, and whose snapshots of it are taken away."""
    monkeypatch.setitem(posthoc._EXPONENTS, "0.07", posthoc.exponent(0.07))
    out = tuned(sd1_folder, shard, tmp_path / "run")
    for path in (out / "checkpoints" / "averages").glob("*-0.07.safetensors"):
        path.unlink()
    assert averaged(out, sd1_folder, "0.07", tmp_path / "made") == 0
    made, start = unet(tmp_path / "made"), unet(sd1_folder)
    change, near, far = (moved(tracked(out, width), start) for width in ("0.07", "0.05", "0.10"))
    error = (moved(made, start) - change).norm()
    assert error < 0.03 * change.norm()
    assert error < 0.3 * min((near - change).norm(), (far - change).norm())


def test_adapters_are_averaged_and_merged(ensemble_folder: Path, shard: str, tmp_path: Path) -> None:
    """W + alpha/rank · B·A with the averages of A and B, for every network that has them."""
    out = tuned(ensemble_folder, shard, tmp_path / "run", "--lora", "2", "--lora-alpha", "6", "--train", "unet,text-encoders,conditioner")
    assert averaged(out, ensemble_folder, "0.05", tmp_path / "made") == 0
    found = load_newest(out / "checkpoints")
    assert found is not None
    averages = {name.removeprefix("0.05/"): tensor for name, tensor in found.power_averages.items() if name.startswith("0.05/")}
    networks = {".".join(name.split(".")[:2]) for name in averages}
    assert len(networks) == 5
    files = {path.name: load_file(path) for path in tmp_path.glob("made-*")}
    assert sum(map(len, files.values())) == len(averages)
    for network in networks:
        kind, _, name = network.partition(".")
        for key, tensor in files[f"made-{name}-pytorch_lora_weights.safetensors"].items():
            inside = key.removeprefix(f"{'unet' if kind == 'unets' else name}.").replace(".weight", ".default.weight")
            torch.testing.assert_close(tensor, averages[f"{network}.{inside}"], atol=2e-3 * tensor.abs().max().item(), rtol=0)
    assert averaged(out, ensemble_folder, "0.05", tmp_path / "made") == 2
    entries = {f"unets.{entry.name}": entry.subfolder for entry in open_folder(ensemble_folder).experts}
    for network in networks:
        folder = entries.get(network, network.removeprefix("text."))
        made, start = (
            {k: v for file in (model / folder).glob("*.safetensors") for k, v in load_file(file).items()}
            for model in (tmp_path / "made", ensemble_folder)
        )
        [down, *_] = sorted(name for name in averages if name.startswith(f"{network}.") and ".lora_A." in name)
        up = averages[down.replace(".lora_A.", ".lora_B.")]
        [weight] = [name for name in made if name.endswith(down.removeprefix(f"{network}.").split(".lora_A.")[0] + ".weight")]
        change = 3 * (up @ averages[down])
        assert change.abs().max() > 1e-4
        assert torch.allclose(made[weight] - start[weight], change, atol=1e-2 * change.abs().max().item())


def test_killed_and_resumed_gives_the_same_average(sd1_folder: Path, shard: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"checkpoint-{STEPS:08d}")
    for path in (tmp_path / "cut" / "checkpoints" / "averages").glob(f"{STEPS:08d}*"):
        path.write_bytes(b"torn by something else")
    tuned(sd1_folder, shard, tmp_path / "cut")
    for name in os.listdir(whole / "checkpoints" / "averages"):
        one, other = ((run / "checkpoints" / "averages" / name).read_bytes() for run in (whole, tmp_path / "cut"))
        assert one == other, name


def test_an_average_may_end_earlier(sd1_folder: Path, shard: str, whole: Path, tmp_path: Path) -> None:
    short = tuned(sd1_folder, shard, tmp_path / "short", "--steps", "8")
    assert averaged(short, sd1_folder, "0.08", tmp_path / "one") == 0
    assert averaged(whole, sd1_folder, "0.08", tmp_path / "other", "--step", "8") == 0
    one, other = unet(tmp_path / "one"), unet(tmp_path / "other")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("width", "more", "words"),
    [("0.5", [], "--sigma-rel 0.5"), ("nan", [], "--sigma-rel nan"), ("0.01", [], "more snapshots"), ("0.07", ["--step", "3"], "2, 4, 6, 8, 10, 12")],
)
def test_what_the_snapshots_cannot_give_is_refused(
    sd1_folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: str, more: list[str], words: str
) -> None:
    assert averaged(whole, sd1_folder, width, tmp_path / "made", *more) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_folders_are_refused(sd1_folder: Path, sd2_folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert averaged(tmp_path, sd1_folder, "0.07", tmp_path / "made") == 2
    assert "--ema-posthoc" in capsys.readouterr().err
    assert averaged(whole, sd2_folder, "0.07", tmp_path / "made") == 2
    assert "--model" in capsys.readouterr().err
    assert averaged(whole, sd1_folder, "0.07", whole / "model") == 2
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
