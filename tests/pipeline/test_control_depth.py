"""Depth maps for ControlNets: those of transformers' own pipeline, recorded, and refused where the network is not what it should be."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_networks import BACKBONES, control_network, depth_network
from PIL import Image
from safetensors.torch import load_file, save_file
from tu_diffuse.batch.studio import model_bytes
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, TuDiffuseError, UnsafeError, UsageError
from tu_diffuse.pipeline.editing.depth import checked_estimator, depth_map
from tu_diffuse.pipeline.editing.inputs import examined
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import text_to_image


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)).resize((50, 36)).save(path)
    return path


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return depth_network(tmp_path_factory.mktemp("depth") / "dpt")


@pytest.fixture(scope="module")
def control(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return control_network(sd1_folder, tmp_path_factory.mktemp("control") / "near")


def wanted(network: Path, picture: Path) -> Image.Image:
    import transformers

    return transformers.pipeline("depth-estimation", model=str(network), device="cpu")(Image.open(picture))["depth"]


@pytest.mark.parametrize("kind", BACKBONES)
def test_maps_equal_transformers_pipeline(kind: str, picture: Path, tmp_path: Path):
    network = depth_network(tmp_path / kind, kind)
    got = depth_map(checked_estimator(network), examined(picture, "control-image"))
    assert np.array_equal(got, np.asarray(wanted(network, picture)))
    assert got.shape == (36, 50)
    assert (got.min(), got.max()) == (0, 255)


def test_the_first_fusion_layer_may_lack_what_it_does_not_use(depth: Path, picture: Path, tmp_path: Path):
    lean = shutil.copytree(depth, tmp_path / "lean")
    state = load_file(lean / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("neck.fusion_stage.layers.0.residual_layer1.")}
    assert len(kept) == len(state) - 4
    save_file(kept, lean / "model.safetensors", {"format": "pt"})
    image = examined(picture, "control-image")
    assert np.array_equal(depth_map(checked_estimator(lean), image), depth_map(checked_estimator(depth), image))


def test_drawn_recorded_and_drawn_again(
    sd1_folder: Path, control: Path, depth: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ready = tmp_path / "ready.png"
    wanted(depth, picture).save(ready)
    shared = ["--model", str(sd1_folder), "--device", "cpu", "--seed", "1", "--steps", "3", "--control-model", str(control)]
    by_hand, ours = tmp_path / "by-hand.png", tmp_path / "ours.png"
    asked = ["--control", "depth", "--control-image", str(picture), "--control-depth-model", str(depth)]
    assert run(["generate", "a", "--out", str(by_hand), "--control-image", str(ready), *shared]) == 0
    assert run(["generate", "a", "--out", str(ours), *asked, *shared]) == 0
    assert np.array_equal(np.asarray(Image.open(by_hand)), np.asarray(Image.open(ours)))
    recorded = read_metadata(ours)["control"]
    assert recorded["kind"] == "depth"
    assert recorded["estimator"] == {"name": "dpt", "sha256": checked_estimator(depth).sha256}
    assert str(tmp_path).encode() not in ours.read_bytes()
    replayed = ["replay", str(ours), "--model", str(sd1_folder), "--input", str(picture), "--control-model", str(control)]
    capsys.readouterr()
    assert run(replayed) == 2
    assert "the depth model 'dpt'" in capsys.readouterr().err
    assert run([*replayed, "--control-depth-model", str(control)]) == 3  # another network
    assert run([*replayed, "--control-depth-model", str(depth)]) == 0
    assert "equal" in capsys.readouterr().out


def test_batch_and_its_pictures_alone(
    sd1_folder: Path, control: Path, depth: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Networks and pictures are found where the plan says, and once they have moved, where replay is told."""
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(control, work / "near")
    shutil.copytree(depth, work / "dpt")
    shutil.copy(picture, work / "photo.png")
    shared = {"steps": 3, "control_image": "photo.png", "control_model": "near", "control": "depth", "control_depth_model": "dpt"}
    (work / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt, **shared}) + "\n" for prompt in "ab"))
    model = ["--model", str(sd1_folder)]
    assert run(["batch", str(work / "p.jsonl"), "--out", str(out), *model, "--device", "cpu"]) == 0
    first = sorted(out.glob("*.png"))[0]
    assert run(["replay", str(first), *model]) == 0
    work.rename(tmp_path / "moved")
    alone = Path(shutil.copy(first, tmp_path / "alone.png"))
    moved = ["--input", str(tmp_path / "moved"), "--control-model", str(tmp_path / "moved" / "near")]
    for path in (first, alone):
        capsys.readouterr()
        assert run(["replay", str(path), *model, "--input", str(tmp_path / "moved")]) == 2
        assert "the ControlNet 'near'" in capsys.readouterr().err
        assert run(["replay", str(path), *model, *moved]) == 2
        assert "the depth model 'dpt'" in capsys.readouterr().err
        assert run(["replay", str(path), *model, *moved, "--control-depth-model", str(tmp_path / "moved" / "dpt")]) == 0
        assert run(["info", str(path)]) == 0


def test_what_cannot_be_is_refused(depth: Path, control: Path, picture: Path, tmp_path: Path):
    cases: list[tuple[str, dict[str, Any], type[TuDiffuseError], str]] = [
        ("config.json", {"model_type": "clip"}, UnsafeError, "only dpt, depth_anything"),
        ("config.json", {"model_type": "zoedepth"}, UnsafeError, "only dpt, depth_anything"),
        ("config.json", {"model_type": "depth_anything", "depth_estimation_type": "metric"}, ModelError, "metres"),
        ("config.json", {"backbone": "someone/model"}, UnsafeError, "names another network"),
        ("config.json", {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet"}}, UnsafeError, "only beit"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, UnsafeError, "custom code"),
        ("preprocessor_config.json", {"image_processor_type": "EvilProcessor"}, UnsafeError, "EvilProcessor"),
        ("preprocessor_config.json", {"auto_map": {}}, UnsafeError, "custom code"),
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, ModelError, "size"),
        ("preprocessor_config.json", {"do_resize": False}, ModelError, "do_resize"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, ModelError, "image_std"),
    ]
    for number, (name, change, error, said) in enumerate(cases):
        folder = shutil.copytree(depth, tmp_path / str(number))
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
        with pytest.raises(error, match=said):
            checked_estimator(folder)
    with pytest.raises(UsageError, match="no folder"):
        checked_estimator(tmp_path)
    with pytest.raises(UnsafeError):
        checked_estimator(control)


def test_what_does_not_fit_is_said_when_it_is_loaded(depth: Path, picture: Path, tmp_path: Path):
    image = examined(picture, "control-image")
    for number, (change, said) in enumerate(
        (
            ({"hidden_size": 32, "pooler_output_size": 32}, "more numbers"),
            ({"num_hidden_layers": 3, "backbone_out_indices": [0, 1, 2, 2]}, "unexpected_keys"),
            ({"num_hidden_layers": 10**6}, "any real network"),
            ({"neck_hidden_sizes": [8, 4, 8, 8]}, "cannot load"),
            ({"num_attention_heads": 0}, "cannot load"),
        )
    ):
        folder = shutil.copytree(depth, tmp_path / str(number))
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
        with pytest.raises(ModelError, match=said):
            depth_map(checked_estimator(folder), image)
    folder = shutil.copytree(depth, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state[next(iter(state))].view(-1)[0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="holds NaN"):
        depth_map(checked_estimator(folder), image)


def test_networks_by_their_names_on_the_hub(
    sd1_folder: Path, control: Path, depth: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("near", control), ("dpt", depth)):
        storage = tmp_path / f"models--me--{name}"
        shutil.copytree(folder, storage / "snapshots" / ("a" * 40))
        (storage / "refs").mkdir()
        (storage / "refs" / "main").write_text("a" * 40)
    line = {"control": "depth", "control_image": picture.name, "control_model": "me/near", "control_depth_model": "me/dpt"}
    file = picture.with_name("hub.jsonl")
    file.write_text(json.dumps({"prompt": "a", "steps": 1, **line}) + "\n")
    assert run(["batch", str(file), "--out", str(tmp_path / "out"), "--model", str(sd1_folder), "--device", "cpu"]) == 0
    recorded = read_metadata(next((tmp_path / "out").glob("*.png")))["control"]
    assert (recorded["model"], recorded["estimator"]["name"]) == ("me/near", "me/dpt")


def test_both_networks_count_in_memory_and_loads(sd1_folder: Path, control: Path, depth: Path, picture: Path, tmp_path: Path, capsys):
    """A budget that holds the model alone does not hold it with its networks, and then each part is let go before the next comes."""
    folder, place = open_folder(sd1_folder), choose_place(device="cpu")
    both: dict[str, Any] = {"control_image": picture, "control_model": control, "control": "depth", "control_depth_model": depth}
    plain, steered = (resolve(folder, "a", [1], steps=3, **asked) for asked in ({}, both))
    numbers = [sum(tensor.numel() for file in path.glob("*.safetensors") for tensor in load_file(file).values()) for path in (control, depth)]
    alone, whole = model_bytes(folder, place, [plain]), model_bytes(folder, place, [plain, steered, steered])
    assert whole - alone == 4 * sum(numbers)
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a", "steps": 3, **{name: str(value) for name, value in both.items()}}) + "\n")

    def told(memory: int, *more: str) -> dict[str, Any]:
        asked = ["batch", str(file), "--out", str(tmp_path / f"out{memory}"), "--model", str(sd1_folder), "--device", "cpu"]
        assert run([*asked, "--memory", str(memory / 2**30), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert told(whole + 1, "--dry-run")["megabytes"] == round(whole / 1e6, 1)
    assert told(alone + 1, "--dry-run")["megabytes"] < whole / 1e6
    assert told(alone + 1)["loads"] == {"text encoders": 1, "unet": 1, "ControlNet": 1, "codec": 1}


def test_a_network_that_is_another_when_it_is_loaded_is_refused(sd1_folder: Path, control: Path, depth: Path, picture: Path, tmp_path: Path):
    """As on a machine of a cluster that has other files under the same path."""
    model = load_model(open_folder(sd1_folder), dtype="float32", device="cpu")
    for name in ("near", "dpt"):
        networks = {one: shutil.copytree(folder, tmp_path / name / one) for one, folder in (("near", control), ("dpt", depth))}
        asked: dict[str, Any] = {"control": "depth", "control_image": picture}
        request = resolve(model.folder, "a", [1], steps=1, control_model=networks["near"], control_depth_model=networks["dpt"], **asked)
        weights = next(networks[name].glob("*.safetensors"))
        save_file({one: tensor * 1.5 for one, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=f"'{name}' .* is not what lies at its path now"):
            list(text_to_image(model, request))
        shutil.rmtree(networks[name])
        with pytest.raises(ModelError, match=f"'{name}' .* is not what lies at its path now"):
            list(text_to_image(model, request))
