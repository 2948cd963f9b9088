"""`tu-diffuse experts`: whole commands, what they print, and their exit codes."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from tu_diffuse.cli.experts import _suggested
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.training.boundary import Suggestion
from tu_diffuse.training.forking import put_weights
from world import STAGES
from write_shards import write_shard

Call = Callable[..., dict[str, Any]]
COMMANDS = ("show", "fork", "compose", "merge", "drop", "suggest-boundary")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `experts ... --json` and return its line."""

    def call(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert run(["experts", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        [line] = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return call


def drawn(folder: Path, out: Path) -> bytes:
    assert run(["generate", "a cat", "--model", str(folder), "--seed", "3", "--steps", "8", "--out", str(out)]) == 0
    with Image.open(out) as image:
        return image.convert("RGB").tobytes()


def test_a_whole_life(call: Call, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = drawn(sd1_folder, tmp_path / "before.png")
    facts = call("show", sd1_folder)
    assert (facts["name"], [expert["name"] for expert in facts["experts"]]) == ("tiny-sd1", ["unet"])
    assert facts["bytes"] == (sd1_folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size

    facts = call("fork", sd1_folder, "--at-timestep", "500", "--out", tmp_path / "forked")
    assert facts["path"] == str(tmp_path / "forked")
    assert [expert["name"] for expert in facts["experts"]] == ["t0500-1000", "t0000-0500"]
    assert call("show", tmp_path / "forked") == {name: value for name, value in facts.items() if name != "path"}
    assert drawn(tmp_path / "forked", tmp_path / "forked.png") == before

    facts = call("fork", tmp_path / "forked", "--expert", "t0000-0500", "--at-timestep", "250", "--at-sigma", "0.3", "--out", tmp_path / "nested")
    names = [expert["name"] for expert in facts["experts"]]
    assert names == ["t0500-1000", "t0250-0500", "t0081-0250", "t0000-0081"]
    assert [expert["stored"] for expert in facts["experts"]] == ["delta"] * 4
    assert drawn(tmp_path / "nested", tmp_path / "nested.png") == before

    facts = call("merge", tmp_path / "nested", "--expert", names[1], "--expert", names[2], "--out", tmp_path / "fewer")
    assert [expert["name"] for expert in facts["experts"]] == ["t0500-1000", "t0081-0500", "t0000-0081"]
    assert facts["parent"] == "unet"
    assert facts["weights"][names[1]] == pytest.approx(250 / 419)
    facts = call("drop", tmp_path / "fewer", "--expert", "t0081-0500", "--to", "lower", "--out", tmp_path / "two")
    assert [expert["name"] for expert in facts["experts"]] == ["t0500-1000", "t0000-0500"]
    call("merge", tmp_path / "two", "--out", tmp_path / "one")
    assert not (tmp_path / "one" / "experts.json").exists()
    assert drawn(tmp_path / "one", tmp_path / "one.png") == before
    capsys.readouterr()
    assert run(["experts", "show", str(tmp_path / "two")]) == 0
    assert "  - name t0500-1000, folder unet_t0500-1000, stored delta, base unet, parent unet" in capsys.readouterr().out


def test_weights_are_applied_and_averages_are_said(
    call: Call, sd1_folder: Path, ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    call("fork", sd1_folder, "--at-timestep", "500", "--out", tmp_path / "forked")
    state = load_file(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    put_weights(open_folder(tmp_path / "forked"), "t0000-0500", tmp_path / "trained", tensors=state | {"conv_out.bias": state["conv_out.bias"] + 0.5})
    weights = ["--weight", "t0000-0500=2", "--weight", "t0500-1000=1"]
    assert call("merge", tmp_path / "trained", *weights, "--out", tmp_path / "merged")["weights"] == {"t0000-0500": 2.0, "t0500-1000": 1.0}
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert (merged["conv_out.bias"] - state["conv_out.bias"]).tolist() == pytest.approx([1.0] * 4)
    assert run(["experts", "merge", str(ensemble_folder), "--out", str(tmp_path / "average")]) == 0
    output = capsys.readouterr()
    assert "they were averaged" in output.err
    assert "parent: -" in output.out


def test_base_and_refiner(call: Call, sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    facts = call("compose", sdxl_folder, refiner_folder, "--border-timestep", "200", "--out", tmp_path / "sdxl")
    assert [(expert["name"], expert["stored"]) for expert in facts["experts"]] == [("t0200-1000", "whole"), ("t0000-0200", "whole")]
    assert facts["notes"] == []
    other = call("compose", sdxl_folder, refiner_folder, "--border-sigma", "1.0", "--out", tmp_path / "other")
    assert other["experts"][0]["sigma_min"] == 1.0
    assert drawn(tmp_path / "sdxl", tmp_path / "a.png") != drawn(sdxl_folder, tmp_path / "b.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]):
    assert run(["experts", command, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"tu-diffuse experts {command}" in output.split("Examples:")[1]
    assert "Exit codes: 0 done" in output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fork", "MODEL", "--at-timestep", "500"], 2, "Missing option"),
        (["fork", "MODEL", "--at-timestep", "0", "--out", "OUT"], 2, "The border 0 is no timestep"),
        (["fork", "MODEL", "--at-timestep", "1000", "--out", "OUT"], 2, "The border 1000 is no timestep"),
        (["fork", "MODEL", "--at-sigma", "-1", "--out", "OUT"], 2, "is not inside the expert"),
        (["fork", "MODEL", "--out", "OUT"], 2, "No border was given"),
        (["fork", "MODEL", "--at-timestep", "many", "--out", "OUT"], 2, "--at-timestep"),
        (["fork", "MODEL", "--at-timestep", "5", "--expert", "x", "--out", "OUT"], 2, "'x' is none of them"),
        (["fork", "MODEL", "--at-timestep", "5", "--out", "MODEL"], 2, "never overwritten"),
        (["fork", "NONE", "--at-timestep", "5", "--out", "OUT"], 2, "is not there"),
        (["merge", "MODEL", "--out", "OUT"], 2, "two experts or more"),
        (["merge", "MODEL", "--weight", "unet", "--out", "OUT"], 2, "not a name and a number"),
        (["drop", "MODEL", "--expert", "unet", "--to", "lower", "--out", "OUT"], 2, "no expert lower than 'unet'"),
        (["drop", "MODEL", "--expert", "unet", "--to", "sideways", "--out", "OUT"], 2, "use lower or higher"),
        (["drop", "MODEL", "--expert", "unet", "--out", "OUT"], 2, "Missing option"),
        (["compose", "MODEL", "--border-timestep", "5", "--out", "OUT"], 2, "1 models and 1 borders"),
        (["compose", "MODEL", "MODEL", "--out", "OUT"], 2, "2 models and 0 borders"),
        (["show", "BAD"], 4, "version 9"),
        (["fork", "TORN", "--at-timestep", "5", "--out", "OUT"], 4, "are not the ones that experts.json names"),
        (["fork", "PICKLED", "--at-timestep", "5", "--out", "OUT"], 3, "pickle"),
        (["fork", "MODEL", "--at-timestep", "5", "--out", "FILE/out"], 74, "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str):
    bad, torn, pickled = (tmp_path / name for name in ("bad", "torn", "pickled"))
    for folder in (bad, torn, pickled):
        shutil.copytree(sd1_folder, folder)
    (bad / "experts.json").write_text(json.dumps({"version": 9, "experts": []}))
    entry = {"name": "unet", "subfolder": "unet", "sigma_min": 0, "sigma_max": None, "sha256": "0" * 64}
    (torn / "experts.json").write_text(json.dumps({"version": 1, "experts": [entry]}))
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "file").write_text("")
    names = {"MODEL": sd1_folder, "OUT": tmp_path / "out", "BAD": bad, "TORN": torn, "PICKLED": pickled, "NONE": tmp_path / "none"}
    names |= {"FILE/out": tmp_path / "file" / "out"}
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(["experts", *(str(names.get(argument, argument)) for argument in arguments)]) == code
    output = capsys.readouterr()
    assert said in " ".join(output.err.split()).replace("│ ", "")
    assert output.out == ""
    assert "Traceback" not in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_border_is_suggested_or_none_stands_out(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shard = str(write_shard(tmp_path, 0, 8, STAGES["shapes"], 5, "png"))
    asked = ["experts", "suggest-boundary", str(sd1_folder), "--shards", shard, "--bins", "4", "--samples", "8"]
    code = run([*asked, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (1 if facts["timestep"] is None else 0)
    assert [(entry["timestep_min"], entry["timestep_max"]) for entry in facts["bins"]] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    best = max(facts["bins"][:-1], key=lambda entry: entry["gain"])
    assert facts["timestep"] in (None, best["timestep_max"])
    assert run(asked) == code
    output = capsys.readouterr()
    assert f"0250-0500  {facts['bins'][1]['loss']:8.5f}  {facts['bins'][1]['gain']:6.3f}" in output.out
    assert ("no border stands out" in output.err) == (code == 1)


def test_the_suggestion_names_the_command_to_run(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = Suggestion("unet", 8, (0, 500, 1000), (0.1, 0.2), (0.75,), 0.1, 500, 500, 500)
    command = _suggested(found, sd1_folder)["command"]
    arguments = shlex.split(command)
    assert arguments[0] == "tu-diffuse"
    assert run([*arguments[1:-1], str(tmp_path / "forked")]) == 0
    assert "t0500-1000" in capsys.readouterr().out


def test_the_embedded_model_can_be_forked(call: Call, tmp_path: Path):
    facts = call("fork", "--expert", "high", "--at-timestep", "800", "--out", tmp_path / "forked")
    assert [expert["parent"] for expert in facts["experts"]] == ["high", "high", None]
    assert facts["bytes"] - call("show")["bytes"] < 1000
