"""Models that are refused are refused with several devices and on a Ray cluster too: before a worker starts, or by the first that loads them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_controls import CONTENTS as NETWORKS
from hostile_controls import PICKLES, make_steered
from hostile_files import CONTENTS, HEADERS
from hostile_folders import CODE, WEIGHTS
from pickle_places import PLACES
from safety_scenes import Scene, put
from tu_diffuse.batch import cluster
from tu_diffuse.cli.main import run

Change = Callable[[Scene], object]
PICKLE = b"\x80\x04cposix\nsystem\n(X\x05\x00\x00\x00falsetR."

FOLDERS: dict[str, Change] = {
    "a pickle alone": lambda scene: PLACES["the model is a folder of a .ckpt"].put(scene, PICKLE),
    "code": lambda scene: CODE["file unet/modeling.py"](scene.model),
    "a class that is not on the list": lambda scene: CODE["model_index: os.system"](scene.model),
    "a link outside": lambda scene: CODE["link: weights outside"](scene.model),
    "names that leave the folder": lambda scene: CODE["model_index: a part elsewhere"](scene.model),
}
"""Refused before anything is started."""

LOADED: dict[str, Change] = {
    "NaN": lambda scene: CONTENTS["vae: NaN"](scene.model),
    "a pickle, renamed": lambda scene: PLACES["vae: renamed .safetensors"].put(scene, PICKLE),
    "a header": lambda scene: put(scene.model / "vae" / WEIGHTS, HEADERS["a terabyte"]),
    "weights of another shape": lambda scene: CONTENTS["text_encoder: another shape"](scene.model),
}
"""Refused by the process that loads them."""


def ends(scene: Scene, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and sentence of `batch`; what it says of progress left out."""
    out = scene.out if not options else scene.root / options[0].strip("-")
    code = run(["batch", str(scene.prompts), "--model", str(scene.model), "--out", str(out), "--batch-size", "1", *options])
    said = capsys.readouterr().err
    assert "with --debug" not in said
    assert not list(out.glob("*.png"))
    return code, next(line for line in said.splitlines() if line.startswith("tu-diffuse: "))


@pytest.mark.parametrize("options", [("--devices", "cpu,cpu"), ("--ray", "local")], ids=["devices", "ray"])
@pytest.mark.parametrize("name", FOLDERS)
def test_refused_before_a_worker_starts(
    whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, str]
):
    scene = whole.copy(tmp_path / "scene")
    FOLDERS[name](scene)
    alone = ends(scene, capsys)
    monkeypatch.setattr(cluster, "connected", None)
    monkeypatch.setattr("tu_diffuse.batch.workers.get_context", None)
    assert ends(scene, capsys, *options) == alone
    assert alone[0] in (3, 4)


@pytest.mark.parametrize("name", [name if name == "NaN" else pytest.param(name, marks=pytest.mark.slow) for name in LOADED])
def test_refused_by_the_workers_of_devices(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    scene = whole.copy(tmp_path / "scene")
    LOADED[name](scene)
    alone = ends(scene, capsys)
    assert ends(scene, capsys, "--devices", "cpu,cpu") == alone
    assert alone[0] in (3, 4)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray_clusters import ray_cluster

    with ray_cluster(1) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_refused_by_the_workers_of_a_cluster(whole: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, name: str):
    scene = whole.copy(tmp_path / "scene")
    LOADED[name](scene)
    alone = ends(scene, capsys)
    assert ends(scene, capsys, "--ray", address) == alone


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*NETWORKS, *PICKLES) if name.endswith((": NaN", ": renamed .safetensors"))])
def test_networks_beside_the_model(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, name: str):
    """Whatever a line's ControlNet or depth model is, one process, workers and a cluster end alike."""
    steered = make_steered(tmp_path, sd1_folder)
    if name in NETWORKS:
        NETWORKS[name](steered)
    else:
        PICKLES[name](steered, PICKLE)
    ends_with: list[tuple[int, str]] = []
    for options in ([], ["--devices", "cpu,cpu"], ["--ray", address]):
        code = run([*(part for part in steered.batch if part not in ("--device", "cpu")), *options, "--json"])
        told = capsys.readouterr()
        events = [json.loads(line) for line in told.out.splitlines()]
        said = [event["message"] for event in events if event["event"] == "problem"]
        said += [line for line in told.err.splitlines() if line.startswith("tu-diffuse: ")]
        ends_with.append((code, said[0]))
        shutil.rmtree(steered.root / "pictures", ignore_errors=True)
    assert ends_with[0] == ends_with[1] == ends_with[2]
    assert ends_with[0][0] in (1, 3, 4)
