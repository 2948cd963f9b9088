"""Whole commands on a tiny ensemble: prompt to picture file, what is printed, what is refused and with which exit code."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tu_diffuse.cli.main import app, run
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.schedulers.registry import SAMPLERS
from typer.testing import CliRunner

Generate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def generate(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run `generate --json` into tmp_path and return its lines."""

    def call(*arguments: str) -> list[dict[str, Any]]:
        out = [] if "--out" in arguments else ["--out", f"{tmp_path}/"]
        assert run(["generate", *arguments, "--model", str(ensemble_folder), "--json", *out]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_prompt_to_picture(ensemble_folder: Path, tmp_path: Path):
    result = CliRunner().invoke(
        app, ["generate", "a red [apple] [/b]", "--model", str(ensemble_folder), "--out", str(tmp_path / "a.png"), "--seed", "7"]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'a.png'}\n"
    assert "step 4/4 low sigma" in result.stderr
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "a.png").std() > 5
    settings = read_metadata(tmp_path / "a.png")
    assert settings["prompt"] == "a red [apple] [/b]"
    assert [expert["name"] for expert in settings["experts"]] == ["high", "low"]
    assert str(tmp_path) not in json.dumps(settings)


def test_defaults_come_from_the_model_and_options_replace_them(generate: Generate):
    settings = generate("a", "--seed", "1")[0]["settings"]
    assert (settings["steps"], settings["sampler"], settings["schedule"], settings["guidance"]) == (4, "dpmpp_2m", "trailing", 3.0)
    changed = generate(
        "a", "--seed", "1", "--steps", "3", "--sampler", "ddim", "--eta", "0.5", "--guidance", "1.5", "--width", "48", "--height", "36"
    )[0]
    assert pixels(changed["path"]).shape == (36, 48, 3)
    applied = {key: changed["settings"][key] for key in ("steps", "sampler", "schedule", "eta", "guidance", "width", "height")}
    assert applied == {"steps": 3, "sampler": "ddim", "schedule": "trailing", "eta": 0.5, "guidance": 1.5, "width": 48, "height": 36}


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "3"],
        ["--guidance", "1"],
        ["--sampler", "euler_a"],
        ["--schedule", "karras"],
        ["--sigmas", "14,3,1"],
        ["--negative", "blue"],
        ["--guidance-rescale", "0.7"],
        ["--guidance-interval", "0.5,5"],
        ["--apg"],
        ["--dynamic-threshold", "0.9"],
        ["--seed", "2"],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda option: option[0],
)
def test_every_option_changes_the_picture(generate: Generate, option: list[str]):
    assert (pixels(generate("a", "--seed", "1")[0]["path"]) != pixels(generate("a", "--seed", "1", *option)[0]["path"])).any()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_a_picture_does_not_depend_on_its_batch(generate: Generate, sampler: str):
    alone = {seed: pixels(generate("a", "--seed", str(seed), "--sampler", sampler)[0]["path"]) for seed in (5, 6, 7, 8)}
    for count in (2, 4):
        for line in generate("a", "--seed", "5", "--count", str(count), "--sampler", sampler):
            assert np.abs(pixels(line["path"]) - alone[line["seed"]]).max() <= 2
    assert (alone[5] != alone[6]).any()


def test_prompts_and_standard_input(generate: Generate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", StringIO("a green heart\n"))
    lines = generate("a star", "-")
    assert [line["prompt"] for line in lines] == ["a star", "a green heart"]
    assert len({line["seed"] for line in lines}) == 2
    assert [line["settings"]["seed"] for line in lines] == [line["seed"] for line in lines]


def test_equal_names_are_numbered(generate: Generate):
    names = [Path(generate("a star!", "--seed", "3")[0]["path"]).name for _ in range(3)]
    assert names == ["a-star-3.png", "a-star-3-2.png", "a-star-3-3.png"]


def test_words_beyond_the_limit_are_named(generate: Generate, ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert list(generate("abc defghijklmnop qrstuvwxyz")[0]["truncated"].items()) == [("t5", "qrstuvwxyz")]
    line = generate("abc defghijklmnop qrstuvwxyz", "--long-prompts", "truncate")[0]
    assert line["truncated"]["clip"] == "defghijklmnop qrstuvwxyz"
    arguments = ["generate", "abc defghijklmnop qrstuvwxyz", "--model", str(ensemble_folder), "--out", str(tmp_path / "s.png"), "--strict"]
    for more, words in (([], "'qrstuvwxyz'"), (["--long-prompts", "truncate"], "'defghijklmnop qrstuvwxyz'")):
        assert run([*arguments, *more]) == 2
        assert f"{words} do not fit" in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(("sampler", "suffix"), [*((sampler, "png") for sampler in SAMPLERS), ("euler_a", "jpg"), ("dpmpp_sde", "webp")])
def test_replay_is_equal(generate: Generate, ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampler: str, suffix: str):
    path = tmp_path / f"a.{suffix}"
    generate("a cat", "--sampler", sampler, "--seed", "9", "--steps", "3", "--guidance-rescale", "0.3", "--out", str(path))
    assert run(["replay", str(path), "--model", str(ensemble_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "equal": True, "largest_difference": 0, "different_pixels": 0, "seed": 9}


def test_replay_of_a_batch_and_of_a_changed_picture(generate: Generate, ensemble_folder: Path, capsys: pytest.CaptureFixture[str]):
    path = generate("a cat", "--seed", "9", "--count", "3", "--apg")[1]["path"]
    assert run(["replay", path, "--model", str(ensemble_folder)]) == 0
    assert capsys.readouterr().out == "equal\n"
    with Image.open(path) as image:
        image.load()
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        chunks.add_text("tu-diffuse", image.info["tu-diffuse"])
        old = image.getpixel((0, 0))
        assert isinstance(old, tuple)
        image.putpixel((0, 0), ((old[0] + 100) % 256, *old[1:]))
        image.save(path, pnginfo=chunks)
    assert run(["replay", path, "--model", str(ensemble_folder)]) == 1
    assert capsys.readouterr().out.startswith("different: 1 pixels, by at most 1")


def test_replay_wants_the_same_model(generate: Generate, sd1_folder: Path, capsys: pytest.CaptureFixture[str]):
    path = generate("a cat", "--seed", "9")[0]["path"]
    assert run(["replay", path, "--model", str(sd1_folder)]) == 2
    assert "was made with the model 'tiny-ensemble'" in capsys.readouterr().err


def test_strip_and_preview(generate: Generate, tmp_path: Path):
    line = generate("a cat", "--seed", "9", "--steps-strip", "--preview")[0]
    strip = pixels(line["steps_strip"])
    assert strip.shape == (158, 4 * 128, 3)
    tiles = [strip[:128, i * 128 + 48 : i * 128 + 80][:32] for i in range(4)]
    assert all((a != b).any() for a, b in pairwise(tiles))
    assert (tiles[3] == pixels(line["path"])).all()  # the last prediction is the picture
    markers = [tuple(strip[128, i * 128 + 5]) for i in range(4)]
    assert len(set(markers[:3])) == 1
    assert markers[3] != markers[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cat-9-steps.png", "a-cat-9.png"]  # the preview is gone


def test_info(generate: Generate, ensemble_folder: Path, capsys: pytest.CaptureFixture[str]):
    line = generate("a cat", "--seed", "9")[0]
    assert run(["info", line["path"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == line["settings"]
    assert run(["info", str(ensemble_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["family"], facts["size_multiple"], facts["prediction"]) == ("tiny-ensemble", "clip-t5", 4, "v_prediction")
    assert [(e["name"], e["sigma_min"]) for e in facts["experts"]] == [("low", 0.0), ("high", 1.5)]
    assert facts["hash"] == line["settings"]["model"]["hash"]
    assert facts["parameters"] == sum(part["parameters"] for part in [*facts["parts"], *facts["experts"]]) > 10_000
    assert run(["info", line["path"]]) == 0
    assert "sampler: dpmpp_2m" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]):
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cpu = report["devices"][-1]
    assert cpu["device"] == "cpu"
    assert "float32" in cpu["dtypes"]
    assert "float32" in cpu["attention"]["math"]
    assert cpu["attention"]["cudnn"] == []


BAD_ARGUMENTS: list[tuple[list[str], int, str]] = [
    (["a", "--sampler", "magic"], 2, "euler, euler_a, heun"),
    (["a", "--schedule", "magic"], 2, "linspace, leading, trailing"),
    (["a", "--width", "33"], 2, "the nearest that fit are 32 and 36"),
    (["a", "--height", "0"], 2, "--height 0 is out of range"),
    (["a", "--steps", "-3"], 2, "--steps -3 is out of range"),
    (["a", "--steps", "0"], 2, "--steps 0 is out of range"),
    (["a", "--guidance", "nan"], 2, "--guidance nan is out of range"),
    (["a", "--guidance", "inf"], 2, "--guidance inf is out of range"),
    (["a", "--guidance-interval", "3"], 2, "not two numbers"),
    (["a", "--guidance-interval", "3,1"], 2, "is empty"),
    (["a", "--guidance-rescale", "2"], 2, "--guidance-rescale 2 is out of range"),
    (["a", "--eta", "0.5"], 2, "ddim"),
    (["a", "--sigmas", "1,2"], 2, "fall"),
    (["a", "--sigmas", "3,1", "--steps", "5"], 2, "5 steps"),
    (["a", "--seed", "-1"], 2, "--seed -1 is out of range"),
    (["a", "--seed", "4294967295", "--count", "2"], 2, "out of range"),
    (["a", "--count", "0"], 2, "--count 0"),
    (["a", "--dtype", "int8"], 2, "float32, float16, bfloat16"),
    (["a", "--device", "tpu"], 2, "cpu, cuda, mps"),
    (["a", "--attention", "magic"], 2, "flash, efficient"),
    (["a", "--format", "gif"], 2, "png, jpeg, webp"),
    (["a", "--steps", "many"], 2, "'--steps'"),
    (["a", "--no-such-option"], 2, "--no-such-option"),
    ([], 2, "Missing argument"),
    ([""], 2, "empty"),
    (["  \n"], 2, "empty"),
    (["a" * 100_000], 2, "100000 characters"),
    (["a\x1b[31m"], 2, "control character U+001B at position 1"),
    (["a\x00b"], 2, "U+0000"),
    (["a\udcff"], 2, "U+DCFF"),
    (["a", "--negative", "\x07"], 2, "U+0007"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), BAD_ARGUMENTS, ids=[" ".join(a)[:24].encode("ascii", "backslashreplace").decode() for a, *_ in BAD_ARGUMENTS]
)
def test_bad_arguments(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str):
    assert run(["generate", *arguments, "--model", str(ensemble_folder), "--out", f"{tmp_path}/"]) == code
    output = capsys.readouterr()
    assert said in " ".join(output.err.split()).replace("│ ", "")
    assert output.out == ""
    assert "Traceback" not in output.err
    assert "\x1b" not in output.err
    assert list(tmp_path.iterdir()) == []


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _pickle_only(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _pickled_text_encoder(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


def _corrupt(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _wrong_shape(folder: Path) -> None:
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "unet" / "diffusion_pytorch_model.safetensors")


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return edit


def _code(folder: Path) -> None:
    (folder / "unet" / "model.py").write_text("raise SystemExit('ran')")


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (_no_folder, 2, "is not there; give a diffusers folder or a .safetensors file with --model"),
        (_no_index, 4, "no model_index.json"),
        (_pickle_only, 3, "pickle"),
        (_pickled_text_encoder, 3, "pickle"),
        (_corrupt, 4, "not a whole safetensors file"),
        (_wrong_shape, 4, "do not fit the config"),
        (_code, 3, "brings code along (unet/model.py)"),
        (_edit("model_index.json", unet=["my_module", "Evil"]), 3, "not on the list"),
        (_edit("model_index.json", _class_name=["custom", "Pipe"]), 3, "pipeline"),
        (_edit("vae/config.json", auto_map={"AutoModel": "x.Y"}), 3, "custom code (auto_map)"),
        (_edit("defaults.json", steps="many"), 4, "'steps' = 'many'"),
        (_edit("experts.json", version=9), 4, "version 9"),
        (_edit("scheduler/scheduler_config.json", beta_schedule="magic"), 4, "magic"),
    ],
)
def test_bad_models(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], code: int, said: str):
    folder = tmp_path / "model"
    shutil.copytree(ensemble_folder, folder)
    damage(folder)
    assert run(["generate", "a", "--model", str(folder), "--out", str(tmp_path / "a.png")]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "a.png").exists()


def test_unwritable_output(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert run(["generate", "a", "--model", str(ensemble_folder), "--out", str(tmp_path / "file" / "a.png")]) == 74
    assert "cannot be written" in capsys.readouterr().err


def test_debug_adds_the_traceback(ensemble_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["generate", "a", "--model", str(ensemble_folder), "--steps", "0", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "--steps 0 is out of range" in error
