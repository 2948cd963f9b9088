"""Headers and configs that claim much, and weights that are not what the config says: one sentence, in bounded time and memory."""

from pathlib import Path

import pytest
from hostile_files import CONFIGS, CONTENTS, HEADERS
from hostile_folders import WEIGHTS, Change
from safety_scenes import EMBEDDING, LOADED_OTHERWISE, LORA, MODEL, Scene, bounded, put
from tu_diffuse.cli.main import run


def ends(whole: Scene, folder: Path, change: Change, command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command over a changed model."""
    scene = whole.copy(folder)
    change(scene.model)
    arguments = [str(argument) for argument in MODEL[command](scene)]
    with bounded(megabytes=1024):
        code = run(arguments)
    said = capsys.readouterr().err
    assert "with --debug" not in said
    assert len(said) < 5000
    return code, said


@pytest.mark.parametrize("name", HEADERS)
def test_headers(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    for number, command in enumerate(("info", "generate", *LOADED_OTHERWISE[len(name) % 4 :])):
        code, said = ends(whole, tmp_path / str(number), lambda model: put(model / "vae" / WEIGHTS, HEADERS[name]), command, capsys)
        assert code in (3, 4), said
        assert "vae" in said
    assert run(["info", str(put(tmp_path / "model.safetensors", HEADERS[name]))]) in (3, 4)
    assert "with --debug" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(HEADERS)])
def test_headers_of_adapters(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    for number, command in enumerate(("generate --lora", "generate --embedding")):
        scene = whole.copy(tmp_path / str(number))
        put(scene.root / "adapter.safetensors", HEADERS[name])
        with bounded(megabytes=1024):
            code = run([str(argument) for argument in (LORA | EMBEDDING)[command](scene)])
        said = capsys.readouterr().err
        assert code in (3, 4), said
        assert "with --debug" not in said


@pytest.mark.parametrize("name", [name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(CONFIGS)])
def test_configs(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    code, said = ends(whole, tmp_path / "scene", CONFIGS[name], "generate", capsys)
    assert code in (2, 3, 4), said


@pytest.mark.parametrize("name", CONTENTS)
def test_contents(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    for number, command in enumerate(("generate", LOADED_OTHERWISE[len(name) % len(LOADED_OTHERWISE)])):
        code, said = ends(whole, tmp_path / str(number), CONTENTS[name], command, capsys)
        assert code == 4, f"{command}: {said}"
        assert "." in said.split("safety", 1)[-1]
