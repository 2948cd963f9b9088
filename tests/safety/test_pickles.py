"""Pickles in every place that a command reads: none is ever loaded, whatever it is called and wherever it lies."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import live_pickles
import pytest
from pickle_places import PLACES
from safety_scenes import LOADED_OTHERWISE, Scene
from tu_diffuse.cli.main import run

_found: list[object] = []
sys.addaudithook(lambda event, arguments: _found.append(arguments) if event == "pickle.find_class" else None)


@pytest.fixture(scope="session")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a pickle that is loaded leaves a file."""
    return tmp_path_factory.mktemp("canaries")


@pytest.fixture(scope="session")
def pickles(canaries: Path) -> dict[str, bytes]:
    return live_pickles.fixtures(canaries)


def test_each_fixture_is_live(tmp_path: Path):
    """The control: loaded as careless programs do, each leaves its canary."""
    subprocess.run([sys.executable, live_pickles.__file__, str(tmp_path)], check=True, capture_output=True)
    fixtures = live_pickles.fixtures(tmp_path)
    assert len(fixtures) >= 60
    assert [name for number, name in enumerate(fixtures) if not os.path.lexists(tmp_path / str(number))] == []


def refused(whole: Scene, tmp_path: Path, canaries: Path, place: str, command: str, data: bytes) -> int:
    """Run a command over a scene with the pickle in its place; its exit code."""
    scene = whole.copy(tmp_path / "scene")
    PLACES[place].put(scene, data)
    arguments = [str(argument) for argument in PLACES[place].commands[command](scene)]
    _found.clear()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(arguments)
    assert os.listdir(canaries) == []
    assert _found == []
    told = f"{place}, {command}: {code} {said.getvalue()}"
    assert "with --debug" not in told, told
    assert code in ((0, 1, 2, 3, 4) if command.startswith(("experts suggest-boundary", "batch", "models verify")) else (0, 2, 3, 4)), told
    return code


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_loaded(whole: Scene, tmp_path: Path, canaries: Path, pickles: dict[str, bytes], place: str):
    """Each place with the commands that must refuse it and some that read it, which take turns as the fixtures do."""
    turn = list(PLACES).index(place)
    every = list(PLACES[place].commands)
    commands = dict.fromkeys([*PLACES[place].refused, *(every[(turn + step) % len(every)] for step in range(2))])
    check(whole, tmp_path, canaries, place, {command: list(pickles.values())[(3 * turn + i) % len(pickles)] for i, command in enumerate(commands)})


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_loaded_by_any_command(whole: Scene, tmp_path: Path, canaries: Path, pickles: dict[str, bytes], place: str):
    """Each place with every command that reads it."""
    turn = list(PLACES).index(place)
    commands = enumerate(PLACES[place].commands)
    check(whole, tmp_path, canaries, place, {command: list(pickles.values())[(turn + 20 * i) % len(pickles)] for i, command in commands})


def check(whole: Scene, tmp_path: Path, canaries: Path, place: str, data: Mapping[str, bytes]) -> None:
    """Run commands, each over a scene with its pickle in the place."""
    runs = enumerate(data.items())
    codes = {command: refused(whole, tmp_path / str(number), canaries, place, command, pickle) for number, (command, pickle) in runs}
    otherwise = [command for command in LOADED_OTHERWISE if command in codes and "generate" in PLACES[place].refused]
    assert {command: codes[command] for command in (*PLACES[place].refused, *otherwise) if codes[command] not in (3, 4)} == {}
    assert not PLACES[place].harmless or set(codes.values()) <= {0, 1}, codes


@pytest.mark.slow
def test_no_pickle_is_loaded_in_any_place(whole: Scene, tmp_path: Path, canaries: Path, pickles: dict[str, bytes]):
    """Each fixture in each place, with the first command that reads it."""
    for name, place in ((name, place) for name in pickles for place in PLACES):
        scene = tmp_path / f"{len(os.listdir(tmp_path))}"
        refused(whole, scene, canaries, place, next(iter(PLACES[place].commands)), pickles[name])
