"""Hostile ControlNets and depth models: refused as hostile models are, by every command that takes them."""

import contextlib
import io
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from random import Random

import live_pickles
import pytest
from hostile_controls import CLAIMS, CODE, CONTENTS, FILES, HEAD, NAMED, PICKLES, Steered, make_steered
from hostile_folders import canary_code
from mutations import mutated
from safety_scenes import bounded, put
from tu_diffuse.cli.main import run

_events: dict[str, list[str]] = {"pickle.find_class": [], "import": [], "open": []}
sys.addaudithook(lambda event, arguments: _events[event].append(str(arguments[0])) if event in _events else None)


def some(names: dict[str, object], of: int) -> list[object]:
    """All names, of which CI runs every `of`-th."""
    return [pytest.param(name, id=name, marks=[pytest.mark.slow] if number % of else []) for number, name in enumerate(names)]


@pytest.fixture(scope="module")
def good(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Steered:
    """The control: a good scene, drawn once by each command; the libraries are imported before memory is bounded."""
    steered = make_steered(tmp_path_factory.mktemp("good"), sd1_folder)
    assert run(steered.generate) == 0
    (steered.root / "out" / "a.png").rename(steered.root / "a.png")
    assert run(steered.replay) == 0
    assert run(steered.batch) == 0
    shutil.rmtree(steered.root / "pictures")
    (steered.root / "out").rmdir()
    return steered


def ends(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with bounded(megabytes=1024), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(arguments)
    assert "with --debug" not in said.getvalue(), said.getvalue()
    assert len(said.getvalue()) < 5000
    return code, said.getvalue()


@pytest.mark.parametrize("name", some(CODE, 2))
def test_code_is_refused_before_it_is_imported(good: Steered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    steered = good.copy(tmp_path / "case")
    for network in FILES:
        put(steered.root / "modeling.py", canary_code(steered.of(network)))
    monkeypatch.syspath_prepend(str(steered.root))
    CODE[name](steered)
    for arguments in (steered.generate, steered.replay):
        _events["import"].clear()
        code, said = ends(arguments)
        assert code == 3, said
        assert "modeling" not in _events["import"]
    assert not (steered.root / "canary").exists()
    assert not (steered.root / "out").exists()


@pytest.mark.parametrize("name", some(NAMED, 3))
def test_names_do_not_leave_the_folder(good: Steered, tmp_path: Path, name: str):
    steered = good.copy(tmp_path / "case")
    put(steered.root / "a.tar", "secret")
    NAMED[name](steered)
    _events["open"].clear()
    code, said = ends(steered.generate)
    assert code in (3, 4), said
    assert not [path for path in _events["open"] if path.endswith(("passwd", "a.tar"))]


@pytest.mark.parametrize("name", some(HEAD, 6))
def test_headers(good: Steered, tmp_path: Path, name: str):
    steered = good.copy(tmp_path / "case")
    HEAD[name](steered)
    code, said = ends(steered.generate)
    assert code in (3, 4), said


@pytest.mark.parametrize("name", some(CLAIMS, 2))
def test_configs(good: Steered, tmp_path: Path, name: str):
    steered = good.copy(tmp_path / "case")
    CLAIMS[name](steered)
    code, said = ends(steered.generate)
    assert code in (3, 4), said


@pytest.mark.parametrize("name", CONTENTS)
def test_contents(good: Steered, tmp_path: Path, name: str):
    steered = good.copy(tmp_path / "case")
    CONTENTS[name](steered)
    code, said = ends(steered.generate)
    assert code == 4, said


@pytest.mark.parametrize("place", PICKLES)
def test_no_pickle_is_loaded(good: Steered, tmp_path: Path, place: str):
    """A few of the live pickles in each place, others in each; the control of the fixtures is in test_pickles.py."""
    canaries = tmp_path / "canaries"
    canaries.mkdir()
    turn = list(PICKLES).index(place)
    fixtures = list(live_pickles.fixtures(canaries).values())
    for number, command in enumerate(("generate", "batch", "replay")):
        steered = good.copy(tmp_path / str(number))
        PICKLES[place](steered, fixtures[(3 * turn + number) % len(fixtures)])
        _events["pickle.find_class"].clear()
        code, said = ends(getattr(steered, command))
        assert code in ((1,) if command == "batch" else (2, 3, 4)), said
        assert _events["pickle.find_class"] == []
        assert os.listdir(canaries) == []


def fuzz(good: Steered, folder: Path, seed: int) -> int:
    random, steered = Random(seed), good.copy(folder)
    names = [mutated(steered.of(random.choice(list(FILES))), random) for _ in range(random.choice((1, 1, 2)))]
    code, said = ends(steered.generate)
    assert code in (0, 2, 3, 4) or (code == 1 and "NaN" in said), f"seed {seed}, {names}: exit code {code}, {said}"
    shutil.rmtree(folder)
    return code


def test_mutated_networks_end_in_one_sentence(good: Steered, tmp_path: Path):
    codes = Counter(fuzz(good, tmp_path / "case", seed) for seed in range(20))
    assert codes[4] > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", range(5))
def test_many_mutated_networks_end_in_one_sentence(good: Steered, tmp_path: Path, block: int):
    codes = Counter(fuzz(good, tmp_path / "case", seed) for seed in range(10_000 + 100 * block, 10_000 + 100 * (block + 1)))
    print(dict(codes))
    assert codes[4] > 30
    assert codes[0] > 0
