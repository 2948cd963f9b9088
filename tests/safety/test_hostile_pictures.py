"""`info` and `replay` on pictures that mean harm: one sentence, in bounded time and memory, and no file or network that they name is touched."""

import json
import sys
from pathlib import Path

import pytest
from hostile_pictures import FILES, changed, with_settings
from safety_scenes import Scene, bounded, put
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.metadata import read_metadata

_touched: list[str] = []


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system") or (event == "open" and "passwd" in str(arguments[0])):
        _touched.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_listen)


@pytest.mark.parametrize("name", FILES)
def test_files(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    path = put(tmp_path / "a.png", FILES[name]())
    for command in (["info", str(path)], ["info", str(path), "--json"], ["replay", str(path), "--model", str(whole.model)]):
        with bounded(megabytes=512):
            code = run(command)
        said = capsys.readouterr().err
        assert code == 4, said
        assert "with --debug" not in said


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 24))])
def test_changed_settings(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: int):
    good = read_metadata(whole.picture)
    cases = changed(good)
    assert len(cases) > 300
    codes: dict[str, int] = {}
    for name, settings in [*list(cases.items())[part::24], *list(cases.items())[-10:]]:
        path = put(tmp_path / "a.png", with_settings(settings))
        _touched.clear()
        with bounded(megabytes=1024):
            assert run(["info", str(path)]) == 0, name
            shown = capsys.readouterr().out
            codes[name] = run(["replay", str(path), "--model", str(whole.model)])
        said = capsys.readouterr().err
        assert "\x1b" not in shown + said, name
        assert codes[name] in (0, 1, 2, 4), f"{name}: {codes[name]} {said}"
        assert "with --debug" not in said, f"{name}: {said}"
        assert _touched == [], name
    drawn = {name for name, code in codes.items() if code in (0, 1)}
    assert len(drawn) < len(codes) // 2
    assert not [
        name for name in drawn if name.startswith(("without width", "without seed", "batch", "8192", "steps = -1", "enlarged", "an input", "a LoRA"))
    ]


def test_a_good_picture_replays(whole: Scene, capsys: pytest.CaptureFixture[str]):
    """The control: what is refused above is refused for what was changed."""
    assert run(["replay", str(whole.picture), "--model", str(whole.model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
