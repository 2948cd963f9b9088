"""Drawing on a Ray cluster of two nodes: the pictures of one process, whoever dies."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import pytest
from killed_runs import At, finish, start, told
from ray_clusters import Dying, drawing, ray_cluster
from tu_diffuse.batch import cluster
from tu_diffuse.batch.cluster import Cluster, Task, connected, draw_on_cluster, make_task, pieces
from tu_diffuse.batch.journal import read_journal
from tu_diffuse.batch.plan import Plan, extend
from tu_diffuse.batch.run import there
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, RenderError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder
from whole_folders import check_complete, digests, leftovers, summary_of

PICTURES, SIZE, STEPS = 16, 2, 4
SIGNALS = ((signal.SIGINT, 130, "interrupted; what was finished is kept."), (signal.SIGTERM, 143, "terminated; what was finished is kept."))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def whole(ensemble_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    finish(command(ensemble_folder, folder), folder / "keys.jsonl")
    return digests(folder / "out")


def command(model: Path, folder: Path, *options: str) -> list[str]:
    (folder / "prompts.txt").write_text("".join(f"picture {number}\n" for number in range(PICTURES)))
    common = f"--batch-size {SIZE} --steps {STEPS} --sampler euler_a"
    return ["batch", str(folder / "prompts.txt"), "--out", str(folder / "out"), "--model", str(model), *common.split(), *options]


def wait_for_a_picture(keys: Path, process: Any) -> None:
    while not any("memory" in line for line in told(keys)):
        assert process.is_alive(), keys.with_suffix(".err").read_text()
        sleep(0.02)


def test_the_pictures_of_one_process_though_a_worker_is_killed_while_it_draws(
    ensemble_folder: Path, address: str, whole: dict[str, str], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.jsonl"
    process = start(command(ensemble_folder, tmp_path, "--ray", address), keys)
    wait_for_a_picture(keys, process)
    victims = drawing()
    assert victims
    victims[0].kill()
    process.join(300)
    said = keys.with_suffix(".err").read_text()
    assert process.exitcode == 0, said
    check_complete(tmp_path / "out", whole)
    assert len(set(whole.values())) == PICTURES
    rows = sum(line.get("rows", 0) for line in told(keys))
    assert PICTURES * STEPS <= rows <= (PICTURES + SIZE) * STEPS + SIZE  # repeated: a batch, and a step of the next
    summary = summary_of(tmp_path / "out")
    assert (summary["drawn"], summary["died"]) == (PICTURES, 1)
    assert said.count("a worker died") == 1
    assert said.count(".png\n") == PICTURES
    assert drawing() == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--memory", "1e-4"]], ids=["whole model", "expert by expert"])
def test_interrupted_terminated_and_resumed(ensemble_folder: Path, address: str, whole: dict[str, str], tmp_path: Path, options: list[str]) -> None:
    """One sentence; what was finished is in folder, journal and summary; the same command ends with the same pixels."""
    keys, out = tmp_path / "keys.jsonl", tmp_path / "out"
    arguments = command(ensemble_folder, tmp_path, "--ray", address, *options)
    for number, code, sentence in SIGNALS:
        keys.unlink(missing_ok=True)
        process = start(arguments, keys)
        wait_for_a_picture(keys, process)
        os.kill(process.pid, number)
        process.join(120)
        said = keys.with_suffix(".err").read_text()
        assert process.exitcode == code, said
        assert said.count("tu-diffuse: ") == said.count(sentence) == 1
        assert "Traceback" not in said
        assert 0 < summary_of(out)["drawn"] < PICTURES
        assert digests(out).items() < whole.items()
        finished = {entry.file for entry in read_journal(out).values()}
        assert finished <= digests(out).keys()
        assert len(digests(out).keys() - finished) <= 1  # written when the signal came, and not yet in the journal: drawn again
        assert leftovers(out) == []
        assert psutil.wait_procs(drawing(), timeout=30)[1] == []
    finish(arguments, keys)
    check_complete(out, whole)


@pytest.mark.slow
def test_signals_while_connecting(ensemble_folder: Path, address: str, whole: dict[str, str], tmp_path: Path) -> None:
    """Ray's own handler would end the process with exit code 15 and no word."""
    keys = tmp_path / "keys.jsonl"
    arguments = command(ensemble_folder, tmp_path, "--ray", address)
    for number, code, sentence in SIGNALS:
        process = start(arguments, keys, At("open", "/proc/[0-9]+/cmdline", signals=(number,)))  # Ray looks for its processes in `ray.init`
        process.join(120)
        said = keys.with_suffix(".err").read_text()
        assert process.exitcode == code, said
        assert said.count("tu-diffuse: ") == said.count(sentence) == 1
        assert not (tmp_path / "out").exists()
    finish(arguments, keys)
    check_complete(tmp_path / "out", whole)


@pytest.mark.slow
def test_a_cluster_of_its_own_that_is_terminated_while_it_starts(ensemble_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    process = start(command(ensemble_folder, tmp_path, "--ray", "local"), keys)
    own = psutil.Process(process.pid)
    while not (started := [child for child in own.children(recursive=True) if "gcs_server" in child.name()]):
        assert process.is_alive(), keys.with_suffix(".err").read_text()
        sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    said = keys.with_suffix(".err").read_text()
    assert process.exitcode == 143, said
    assert said.count("tu-diffuse: terminated") == 1
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert not (tmp_path / "out").exists()


def test_what_rays_handler_of_sigterm_raised_is_our_handlers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while it connects: Ray has replaced the handler and exits with the signal's number."""
    ray = pytest.importorskip("ray")

    class Terminated(BaseException):
        pass

    def ours(*_: Any) -> None:
        raise Terminated

    def init(*_: Any, **__: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(Terminated), connected("127.0.0.1:1", "cpu"):
            pass
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_cluster_of_its_own(ensemble_folder: Path, whole: dict[str, str], tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    finish(command(ensemble_folder, tmp_path, "--ray", "local"), keys)
    check_complete(tmp_path / "out", whole)
    assert drawing() == []


@pytest.mark.slow
def test_a_batch_that_kills_its_workers_is_left_and_its_neighbours_are_drawn(
    address: str, items, ensemble: ModelFolder, studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_Worker", Dying)
    prompts = [Dying.PROMPT if number == 9 else f"picture {number}" for number in range(16)]
    plan = extend(Plan(ensemble.fingerprint), items(*prompts, steps=1), 1)
    deaths: list[str] = []
    with connected(address, "cpu") as found:
        task = make_task(ensemble, studio().place, None, found, None, {}, 0)
        told: tuple[Any, ...] = (cluster.Counter(), lambda _: None, lambda _: None, deaths.append)
        with pytest.raises(RenderError, match="2 times of each of 1 batches"):
            draw_on_cluster(found, task, plan, {}, tmp_path, (1, 1), *told)
    drawn = {planned.item.request.prompt for planned in plan.wanted if planned.item.key in there(plan, tmp_path)}
    assert drawn == set(prompts) - {Dying.PROMPT}
    assert 2 <= len(deaths) <= 6


@pytest.fixture
def task(ensemble: ModelFolder, studio) -> Task:
    return make_task(ensemble, studio().place, None, Cluster(1, {}, 1), None, {}, 0)


def test_a_worker_refuses_another_model_and_another_version(task: Task) -> None:
    assert cluster._Worker(task)._opened().folder.fingerprint == task.fingerprint
    with pytest.raises(ModelError, match="is not the one here"):
        cluster._Worker(replace(task, fingerprint="0" * 64))._opened()
    with pytest.raises(ModelError, match="is not the file here"):
        cluster._Worker(replace(task, files={"0" * 64: Path("lora.safetensors")}))._opened()
    with pytest.raises(ModelError, match=r"has tu-diffuse .* and this is 9\.9"):
        cluster._Worker(replace(task, version="9.9"))._opened()


def test_an_error_in_a_worker_comes_after_what_it_made(task: Task, items) -> None:
    worker = cluster._Worker(replace(task, fingerprint="0" * 64))
    with pytest.raises(ModelError):
        list(worker.draw([items("a")]))


def test_pieces_grow_smaller_and_are_the_whole() -> None:
    for count, workers in ((0, 2), (1, 4), (7, 1), (40, 2), (1000, 16)):
        batches = [[number] for number in range(count)]
        sizes = [len(piece) for piece in pieces(batches, workers)]  # pyright: ignore[reportArgumentType]
        assert [batch for piece in pieces(batches, workers) for batch in piece] == batches  # pyright: ignore[reportArgumentType]
        assert sizes == sorted(sizes, reverse=True)
        assert not sizes or sizes[-1] == 1
    assert sizes[0] == 31


def test_how_many_workers_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.torch, "get_num_threads", lambda: 4)
    cores, gpus = {"CPU": 16.0}, {"CPU": 8.0, "GPU": 2.0}
    assert cluster._measured([cores, gpus], "auto") == Cluster(2, {"num_gpus": 1}, 1)
    assert cluster._measured([cores, gpus], "cpu") == Cluster(6, {"num_cpus": 4}, 4)
    assert cluster._measured([{"CPU": 1.0}, {"CPU": 2.0}, {}], "auto") == Cluster(1, {"num_cpus": 2}, 1)
    with pytest.raises(UsageError):
        cluster._measured([{"memory": 1.0}], "auto")


@pytest.mark.parametrize(
    "options", [["--ray", "ray://head:10001"], ["--ray", "local", "--devices", "cpu,cpu"], ["--ray", "local", "--dry-run"], ["--ray", "nonsense"]]
)
def test_what_contradicts_or_cannot_be_reached(ensemble_folder: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(ensemble_folder, tmp_path, *options)) == 2
    assert "--ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_signals_handler_raised_comes_out_of_rays_wait() -> None:
    with pytest.raises(KeyboardInterrupt), cluster._signals_as_raised():
        raise SystemError from KeyboardInterrupt()
