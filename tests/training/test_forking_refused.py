"""What becomes of experts' folders when something is wrong: it is said, and nothing is overwritten or half written."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_folders import WHOLE, at, draw
from safetensors.torch import load_file, save_file
from tu_diffuse.errors import ModelError, OutputError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.training.forking import drop, fork, put_weights
from tu_diffuse.training.intervals import sigma_of
from tu_diffuse.training.merging import merge

INF = math.inf


def _fork(borders: list[float] | None = None, **asked: Any) -> Callable[[ModelFolder, Path], object]:
    return lambda model, out: fork(model, [2.0] if borders is None else borders, out, **asked)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (_fork(), "none was named"),
        (_fork(expert="middle"), "'middle' is none of them"),
        (_fork([1.5], expert="high"), "is not inside the expert 'high'"),
        (_fork([1.0], expert="high"), "is not inside the expert 'high'"),
        (_fork([2.0, math.nan], expert="high"), "is not inside"),
        (_fork([INF], expert="high"), "is not inside"),
        (_fork([], expert="high"), "No border"),
        (_fork([2.0, 2.0001], expert="high"), "no whole timestep"),
        (_fork([20.0], expert="high"), "no whole timestep"),
        (_fork([0.001], expert="low"), "no whole timestep"),
        (lambda m, out: drop(m, "low", out, heir="lower"), "no expert lower than 'low'"),
        (lambda m, out: drop(m, "high", out, heir="higher"), "no expert higher than 'high'"),
        (lambda m, out: drop(m, "middle", out, heir="higher"), "'middle' is none of them"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(ensemble: ModelFolder, tmp_path: Path, act: Callable[..., object], said: str):
    with pytest.raises(UsageError, match=said):
        act(ensemble, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timestep", [0.0, -1.0, 999.5, 1000.0, math.nan, INF])
def test_borders_outside_the_schedule(plain: ModelFolder, timestep: float):
    with pytest.raises(UsageError, match="above 0 and up to 999"):
        sigma_of(plain.noise, timestep)


def test_nothing_is_overwritten(plain: ModelFolder, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "dangling"):
        with pytest.raises(UsageError, match="never overwritten"):
            fork(plain, at(plain, 500), tmp_path / name)
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_damage_is_not_built_upon(ensemble: ModelFolder, tmp_path: Path):
    fork(ensemble, at(ensemble, 800), tmp_path / "forked", expert="high")
    path = tmp_path / "forked" / "unet" / WHOLE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = open_folder(tmp_path / "forked")
    top = model.experts[-1].name
    acts: list[Callable[[Path], object]] = [
        lambda out: fork(model, at(model, 900), out, expert=top),
        lambda out: merge(model, out),
        lambda out: drop(model, "low", out, heir="higher"),
    ]
    for act in acts:
        with pytest.raises(ModelError, match="are not the ones that"):
            act(tmp_path / "out")
    with pytest.raises(ModelError, match="are not the ones that"):
        draw(tmp_path / "forked")
    shutil.rmtree(tmp_path / "forked" / "unet_low")
    shutil.rmtree(tmp_path / "forked" / "unet")
    with pytest.raises(ModelError, match="'unet'"):
        open_folder(tmp_path / "forked")
    assert [path.name for path in tmp_path.iterdir()] == ["forked"]


def test_weights_that_do_not_fit_are_refused(ensemble: ModelFolder, tmp_path: Path):
    state = load_file(ensemble.path / "unet" / WHOLE)
    del state["conv_in.bias"]
    with pytest.raises(ModelError, match="names and shapes of the expert 'high'"):
        put_weights(ensemble, "high", tmp_path / "out", tensors=state)
    save_file({"unet.no_such.lora.down.weight": torch.zeros(1, 2), "unet.no_such.lora.up.weight": torch.zeros(2, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="no_such"):
        put_weights(ensemble, "high", tmp_path / "out", lora=tmp_path / "a.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(plain: ModelFolder, tmp_path: Path):
    """Files may grow to 4 KiB only; the unet is larger, so writing fails in the middle."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tu_diffuse.pipeline.model.folder import open_folder\n"
        "from tu_diffuse.training.forking import fork\n"
        "from tu_diffuse.errors import OutputError\n"
        "model = open_folder(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for whole in (False, True):\n"
        "    try:\n"
        "        fork(model, [1.0], Path(sys.argv[2]) / 'out', whole=whole, link=whole)\n"
        "    except OutputError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, plain.path, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written") == 2, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(plain: ModelFolder, tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        fork(plain, at(plain, 500), tmp_path / "out")


def test_an_interrupted_write_leaves_nothing(plain: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tu_diffuse.training import expert_files

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(expert_files, "write_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork(plain, at(plain, 500), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
