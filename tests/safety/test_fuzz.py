"""Mutated model folders: each ends in one sentence and the right exit code, in bounded time and memory; or it is a model, and is drawn."""

import contextlib
import io
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from mutations import mutated
from safety_scenes import MODEL, Scene, bounded
from tu_diffuse.cli.main import run

COMMANDS = ("generate", "generate", "info", "experts show", "experts fork", "experts merge")


def fuzz(scene: Scene, folder: Path, seed: int) -> int:
    """One case: its exit code."""
    random = Random(seed)
    case = scene.copy(folder)
    name = " and ".join(mutated(case.model, random) for _ in range(random.choice((1, 1, 1, 2))))
    command = random.choice(COMMANDS)
    said = io.StringIO()
    with bounded(megabytes=1024), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run([str(argument) for argument in MODEL[command](case)])
    told = f"seed {seed}, {command}, {name}: exit code {code}, {said.getvalue()[-2000:]}"
    assert code in (0, 2, 3, 4) or (code == 1 and "NaN" in told), told  # values that overflow while drawing are no fault of a file's form
    assert "with --debug" not in told, told
    shutil.rmtree(folder)
    return code


@pytest.fixture(scope="module")
def model_only(whole: Scene, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("fuzz"))
    shutil.copytree(whole.model, scene.model)
    return scene


def check(codes: Counter[int]) -> None:
    """Not all is refused and not all is taken."""
    print(dict(codes))
    assert codes[4] > codes.total() // 3
    assert codes[0] > 0
    assert codes[3] > 0


@pytest.mark.parametrize("block", range(4))
def test_mutated_models_end_in_one_sentence(model_only: Scene, tmp_path: Path, block: int):
    check(Counter(fuzz(model_only, tmp_path / "case", seed) for seed in range(50 * block, 50 * (block + 1))))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_mutated_models_end_in_one_sentence(model_only: Scene, tmp_path: Path, block: int):
    check(Counter(fuzz(model_only, tmp_path / "case", 10_000 + seed) for seed in range(200 * block, 200 * (block + 1))))
