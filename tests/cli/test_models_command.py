"""`tu-diffuse models`."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import Hub, files_below, hub_stand_in, use_hub
from PIL import Image
from safetensors.torch import load_file, save_file
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.model.describe import licence
from tu_diffuse.pipeline.model.folder import open_folder

Said = Callable[..., list[dict[str, Any]]]


def test_info(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = shutil.copytree(ensemble_folder, tmp_path / "mine")
    (folder / "README.md").write_text('---\nlicense: other\ntags:\n- x\nlicense_name: "my-licence"  # ours\n---\n# Card\nlicense: not-this\n')
    assert run(["models", "info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    weights = list(folder.rglob("*.safetensors"))
    assert (facts["name"], facts["family"], facts["licence"]) == ("mine", "clip-t5", "my-licence")
    assert facts["parameters"] == sum(tensor.numel() for path in weights for tensor in load_file(path).values())
    assert facts["megabytes"] == pytest.approx(sum(path.stat().st_size for path in weights) / 1e6, abs=0.3)
    assert run(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_info_of_weights_alone(hub: Hub, tmp_path: Path, said: Said, capsys: Any):
    lora = tmp_path / "cats.safetensors"
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 8),
        "lora_unet_x.lora_up.weight": torch.ones(8, 2),
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    save_file({name: tensor.half() for name, tensor in tensors.items()}, lora, {"modelspec.license": "mine", "ss_base_model_version": "sd_v1"})
    expected = {"kind": "lora", "name": "cats.safetensors", "commit": None, "licence": "mine", "architecture": "sd_v1", "tensors": 3}
    for command in (["info"], ["models", "info"]):
        assert said(*command, lora)[0] == expected | {"parameters": 33, "dtype": "F16", "megabytes": 0.0}
    assert licence(lora / "epsilon") == "mine"  # as a single-file checkpoint is asked
    shutil.copytree(tmp_path, tmp_path / "t5", ignore=shutil.ignore_patterns("cache", "t5"))
    (tmp_path / "t5" / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    commit = hub.push("me/t5", files_below(tmp_path / "t5") | {"README.md": b"---\nlicense: mit\n---\n"})
    assert run(["info", "me/t5"]) == 2  # not fetched
    assert (hub.requests, "models pull me/t5" in capsys.readouterr().err) == ([], True)
    hub.push("me/t5", {name.replace("cats", "model"): data for name, data in hub.commits["me/t5"][commit].items()})
    said("models", "pull", "me/t5")
    [facts] = said("info", "me/t5")
    assert (facts["kind"], facts["name"], facts["architecture"], facts["parameters"]) == ("network", "me/t5", "T5EncoderModel", 33)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in() as stand_in:
        use_hub(stand_in, tmp_path / "cache", monkeypatch)
        yield stand_in


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command with --json and return the objects that it prints."""

    def call(*arguments: object, code: int = 0) -> list[dict[str, Any]]:
        assert run([*map(str, arguments), "--json"]) == code, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def test_a_picture_of_a_hub_model_is_drawn_again_at_its_commit(hub: Hub, ensemble_folder: Path, tmp_path: Path, said: Said, capsys: Any):
    files = files_below(ensemble_folder)
    commit = hub.push("me/tiny", files)
    [line] = said("generate", "a cat", "--model", "me/tiny", "--seed", 3, "--out", tmp_path / "a.png")
    local = open_folder(ensemble_folder).fingerprint
    assert line["settings"]["model"] == {"name": "me/tiny", "commit": commit, "hash": local, "prediction_type": "v_prediction"}
    changed = files | {"scheduler/scheduler_config.json": files["scheduler/scheduler_config.json"].replace(b"0.012", b"0.011")}
    assert changed != files
    hub.push("me/tiny", changed)
    assert said("models", "pull", "me/tiny")[-1]["commit"] != commit
    assert open_folder(Path("me/tiny")).fingerprint != local
    hub.requests.clear()
    for model in ([], ["--model", "me/tiny"], ["--model", ensemble_folder]):
        assert said("replay", line["path"], *model)[0]["equal"]
    assert hub.requests == []
    said("models", "remove", f"me/tiny@{commit}", "--yes")
    assert run(["replay", line["path"]]) == 2
    assert f"first run tu-diffuse models pull me/tiny@{commit}" in capsys.readouterr().err
    assert hub.requests == []  # a picture makes nobody ask the network
    assert said("replay", line["path"], "--model", "me/tiny")[0]["equal"]
    assert len(hub.requests) > 10


def test_pull_list_verify_and_remove(hub: Hub, sd1_folder: Path, tmp_path: Path, said: Said, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    files = files_below(sd1_folder) | {"README.md": b"---\nlicense: openrail++\n---\n", "unet/diffusion_pytorch_model.bin": b"x"}
    commit = hub.push("me/sd", files)
    [plan, *fetched, done] = said("models", "pull", "me/sd")
    assert (plan["event"], plan["name"], plan["commit"], plan["missing"]) == ("plan", "me/sd", commit, plan["files"])
    assert {event["path"] for event in fetched} == set(files) - {"unet/diffusion_pytorch_model.bin"}
    assert sum(event["megabytes"] for event in fetched) == pytest.approx(plan["megabytes"], abs=0.6)
    assert done == {"event": "done", "path": done["path"], "commit": commit}
    hub.requests.clear()
    assert said("models", "pull", "me/sd", "--offline") == [done]

    [facts] = said("models", "info", "me/sd")
    assert (facts["name"], facts["commit"], facts["licence"], facts["family"]) == ("me/sd", commit, "openrail++", "sd")
    [listed] = said("models", "list")
    assert (listed["name"], listed["commit"], listed["refs"], listed["family"]) == ("me/sd", commit, ["main"], "sd")
    local = said("models", "list", sd1_folder.parent)[1]
    assert (local["name"], local["commit"], local["family"], local["path"]) == ("tiny-sd1", None, "sd", str(sd1_folder))

    [verified] = said("models", "verify", "me/sd")
    assert (set(verified["checked"]), verified["bad"], verified["unrecorded"]) == ({event["path"] for event in fetched}, [], [])
    assert verified["bytes"] == sum(len(files[name]) for name in verified["checked"])
    assert hub.requests == []
    weights = (Path(done["path"]) / "vae" / "diffusion_pytorch_model.safetensors").resolve()
    flip(weights)
    assert said("models", "verify", "me/sd", code=4)[0]["bad"] == ["vae/diffusion_pytorch_model.safetensors"]
    flip(weights)
    assert said("models", "verify", "me/sd")[0]["bad"] == []

    copy = shutil.copytree(sd1_folder, tmp_path / "copy")
    [against] = said("models", "verify", copy, "--against", "me/sd")
    assert (set(against["checked"]), against["bad"]) == (set(verified["checked"]) - {"README.md"}, [])
    flip(copy / "unet" / "diffusion_pytorch_model.safetensors")
    assert said("models", "verify", copy, "--against", "me/sd", code=4)[0]["bad"] == ["unet/diffusion_pytorch_model.safetensors"]
    assert said("models", "verify", copy, code=1)[0]["checked"] == []  # nothing is recorded there

    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["models", "remove", "me/sd"]) == 2
    assert "give --yes" in capsys.readouterr().err
    [removed] = said("models", "remove", "me/sd", "--yes")
    assert (removed["commits"], removed["megabytes"]) == ([commit], pytest.approx(plan["megabytes"], abs=0.1))
    assert said("models", "list") == []
    assert run(["models", "remove", "me/sd", "--yes"]) == 2
    assert run(["models", "remove", str(copy), "--yes"]) == 2
    assert copy.is_dir()
    assert run(["models", "info", "me/sd"]) == 2
    assert "fetch it with tu-diffuse models pull me/sd" in capsys.readouterr().err


def test_a_flipped_byte_of_an_expert(ensemble_folder: Path, tmp_path: Path, said: Said):
    forked = tmp_path / "forked"
    said("experts", "fork", ensemble_folder, "--expert", "high", "--at-timestep", 700, "--out", forked)
    [whole] = said("models", "verify", forked)
    assert (sorted(whole["checked"]), whole["bad"]) == (sorted(path.name for path in forked.glob("unet*")), [])
    assert "vae/diffusion_pytorch_model.safetensors" in whole["unrecorded"]
    flip(forked / "unet" / "diffusion_pytorch_model.safetensors")
    assert said("models", "verify", forked, code=4)[0]["bad"] == ["unet"]


@pytest.mark.parametrize("link", [[], ["--link"]], ids=["copied", "linked"])
def test_a_model_made_of_a_hub_model_is_whole_without_it(hub: Hub, ensemble_folder: Path, tmp_path: Path, said: Said, link: list[str]):
    """The cache's files are links, which a new folder must not take over."""
    hub.push("me/tiny", files_below(ensemble_folder))
    said("experts", "fork", "me/tiny", "--expert", "low", "--at-timestep", 100, "--out", tmp_path / "forked", *link)
    said("models", "remove", "me/tiny", "--yes")
    assert not any(path.is_symlink() for path in (tmp_path / "forked").rglob("*"))
    [before] = said("generate", "a cat", "--model", ensemble_folder, "--seed", 3, "--out", tmp_path / "a.png")
    [after] = said("generate", "a cat", "--model", tmp_path / "forked", "--seed", 3, "--out", tmp_path / "b.png")
    with Image.open(before["path"]) as one, Image.open(after["path"]) as other:
        assert one.tobytes() == other.tobytes()


def test_other_variants_in_the_cache_do_not_change_a_model(hub: Hub, sd1_folder: Path, said: Said):
    files = files_below(sd1_folder)
    half = {name.replace(".safetensors", ".fp16.safetensors"): data for name, data in files.items() if name.endswith(".safetensors")}
    hub.push("me/sd", files | half | {"sd.safetensors": b"x"})
    said("models", "pull", "me/sd")
    [before] = said("models", "info", "me/sd")
    said("models", "pull", "me/sd", "--variant", "fp16")
    said("models", "pull", "me/sd", "--file", "sd.safetensors")
    assert len(list(open_folder(Path("me/sd")).path.rglob("*.fp16.safetensors"))) == 3
    assert said("models", "info", "me/sd") == [before]


def test_a_variant_that_is_asked_for_is_what_is_fetched(hub: Hub, sd1_folder: Path, tmp_path: Path, said: Said):
    files = files_below(sd1_folder)
    half = {name.replace(".safetensors", ".fp16.safetensors"): data for name, data in files.items() if name.endswith(".safetensors")}
    hub.push("me/sd", files | half)
    arguments = ["generate", "a cat", "--model", "me/sd", "--steps", 2]
    [drawn] = said(*arguments, "--variant", "fp16", "--out", tmp_path / "a.png")
    weights = {path.name for path in open_folder(Path("me/sd")).path.rglob("*.safetensors")}
    assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert said("replay", drawn["path"])[0]["equal"]
    said(*arguments, "--variant", "bf16", code=2)


def test_contents_that_repositories_share(hub: Hub, sd1_folder: Path, tmp_path: Path, said: Said):
    """huggingface_hub keeps what came through Xet once for all repositories: `blobs` of a repository are links then."""
    hub.push("me/sd", files_below(sd1_folder))
    folder = Path(said("models", "pull", "me/sd")[-1]["path"])
    [before] = said("models", "info", "me/sd")
    blob = (folder / "unet" / "diffusion_pytorch_model.safetensors").resolve()
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert said("models", "info", "me/sd") == [before]
    assert said("models", "verify", "me/sd")[0]["bad"] == []
    flip(shared)
    assert said("models", "verify", "me/sd", code=4)[0]["bad"] == ["unet/diffusion_pytorch_model.safetensors"]


def test_as_people_call_it(ensemble_folder: Path, tmp_path: Path):
    """The console script with HF_ENDPOINT and HF_HOME; --offline before the command."""
    with hub_stand_in() as hub:
        commit = hub.push("me/tiny", files_below(ensemble_folder))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

        def call(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "tu_diffuse", *arguments]
            return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

        refused = call("--offline", "generate", "a cat", "--model", "me/tiny")
        assert (refused.returncode, hub.requests) == (2, [])
        assert "is not whole in the hub's cache" in refused.stderr
        pulled = call("models", "pull", "me/tiny")
        assert pulled.returncode == 0
        first, *lines = pulled.stderr.splitlines()
        assert first.startswith(f"fetching me/tiny (commit {commit[:12]}): {len(lines)} files")
        assert Path(pulled.stdout.strip()) == tmp_path / "home" / "hub" / "models--me--tiny" / "snapshots" / commit
        assert all(path.startswith(("/api/models/me/tiny/", "/me/tiny/", "/cdn/")) for _, path, _ in hub.requests)
        hub.requests.clear()
        assert call("--offline", "generate", "a cat", "--model", "me/tiny", "--out", "a.png").returncode == 0
        assert hub.requests == []
        assert (tmp_path / "a.png").is_file()


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
