"""Model folders that bring or ask for code are refused before anything is imported; names in their files do not lead out of them."""

import json
import os
import sys
from pathlib import Path

import pytest
from hostile_folders import CODE, NAMED, canary_code, hub_cache
from safety_scenes import MODEL, Scene, put
from tu_diffuse.cli.main import run

COMMANDS = ("generate", "generate --offload", "info", "finetune", "experts show", "experts fork")
_opened: list[str] = []
_imported: list[str] = []


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        _opened.append(str(arguments[0]))
    elif event == "import":
        _imported.append(str(arguments[0]))


sys.addaudithook(_listen)


@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_before_it_is_imported(
    whole: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    scene = whole.copy(tmp_path / "scene")
    for module in ("modeling", "pipeline", "my_scheduler", "tok", "helper"):  # what configs name is there to be imported
        put(scene.root / f"{module}.py", canary_code(scene.model))
    monkeypatch.syspath_prepend(str(scene.root))
    CODE[name](scene.model)
    for number, command in enumerate(COMMANDS[:4] if len(name) % 2 else COMMANDS[3:]):
        _imported.clear()
        assert run([str(argument) for argument in MODEL[command](scene)]) == 3, f"{command} {number}: {capsys.readouterr().err}"
        assert not {"modeling", "pipeline", "my_scheduler", "tok", "helper"} & set(_imported)
    assert not (scene.root / "canary").exists()
    assert not scene.out.exists()


def test_the_canary_sings(tmp_path: Path):
    """The control: imported, the code leaves its file."""
    exec(canary_code(tmp_path / "model"), {})
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", NAMED)
def test_names_do_not_leave_the_folder(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    scene = whole.copy(tmp_path / "scene")
    put(scene.root / "passwd", "secret")
    NAMED[name](scene.model)
    _opened.clear()
    assert run([str(argument) for argument in MODEL["generate"](scene)]) in (3, 4), capsys.readouterr().err
    assert not [path for path in _opened if path.endswith(("passwd", "a.tar"))]
    assert not list(scene.out.glob("*.png"))


def test_links_of_a_hub_cache_are_followed(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene = whole.copy(tmp_path / "scene")
    snapshot = hub_cache(scene.model)
    assert run(["generate", "a", "--model", str(snapshot), "--seed", "1", "--out", str(scene.root / "b.png"), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["prompt"] == "a"
    os.symlink("../../../a.tar", snapshot / "LICENSE")
    assert run(["info", str(snapshot)]) == 3
    assert "leads out of the folder (LICENSE)" in capsys.readouterr().err
