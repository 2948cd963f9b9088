"""Several worker processes on one folder: the pictures of one process, whoever dies."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from time import sleep

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tu_diffuse.batch.drafts import Stepped
from tu_diffuse.batch.journal import Entry
from tu_diffuse.batch.plan import Plan, extend
from tu_diffuse.batch.run import draw_missing, summarise, there
from tu_diffuse.batch.workers import Job, draw_in_workers, shares
from tu_diffuse.cli.main import run
from tu_diffuse.errors import RenderError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.pipeline.model.place import choose_device

PROMPTS = ("a", "b", "c", {"prompt": "d", "steps": 3}, "e", "f", "g")


def digests(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in folder.glob("0*.png"):
        with Image.open(path) as image:
            found[path.name] = hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
    return found


def workers() -> Iterator[psutil.Process]:
    return (child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))


@pytest.fixture
def plan(items, ensemble: ModelFolder) -> Plan:
    return extend(Plan(ensemble.fingerprint), items(*PROMPTS, sampler="euler_a"), 2)


def jobs(plan: Plan, studio, out: Path) -> list[Job]:
    out.mkdir()
    one = studio()
    return [Job(one.folder.path, one.place, True, 0, share, out, None, {}) for share in shares(plan, (1, 1), 2)]


def test_shares_are_the_whole_and_do_not_overlap(plan: Plan):
    for parts in (1, 2, 3):
        dealt = [share for number in range(parts) for share in shares(plan, (number + 1, parts), 2)]
        assert sorted(batch[0].name for share in dealt for batch in share.batches) == sorted(batch[0].name for batch in plan.batches)
    assert len(plan.batches) == 4


def test_the_pictures_of_one_process_though_a_worker_is_killed(plan: Plan, studio, tmp_path: Path):
    whole = tmp_path / "whole"
    whole.mkdir()
    entries: list[Entry] = []
    draw_missing(studio(), plan, {}, whole, part=(1, 1), window_bytes=0, tell=lambda _: None, kept=entries.append)
    assert len(entries) == 7
    killed: list[int] = []

    def tell(event: Stepped) -> None:
        if not killed:
            victim = next(workers())
            killed.append(victim.pid)
            victim.kill()

    out, loads, deaths = tmp_path / "out", Counter[str](), list[str]()
    entries = list(draw_in_workers(jobs(plan, studio, out), loads, tell, deaths.append))
    assert killed
    assert deaths == ["cpu (exit code -9)"]
    assert {entry.key for entry in there(plan, out).values()} == {planned.item.key for planned in plan.wanted}
    assert len({entry.key for entry in entries}) >= 5  # a line that was written but not told before the kill is in the journal
    assert digests(out) == digests(whole)
    assert loads["codec"] == 2
    assert not list(workers())


def test_what_a_dead_worker_left_is_drawn_by_the_next_run(plan: Plan, studio, tmp_path: Path):
    out, over = tmp_path / "out", Event()

    def kill() -> None:
        while not over.wait(0.1):
            for victim in workers():
                victim.kill()

    killer = Thread(target=kill)
    mine = jobs(plan, studio, out)
    killer.start()
    with pytest.raises(RenderError, match=r"cpu \(exit code -9\), cpu \(exit code -9\) died 2 times"):
        list(draw_in_workers(mine, Counter(), lambda _: None, lambda _: None))
    over.set()
    killer.join()
    summary = summarise(plan, out, 0, {}, part=(1, 1), started=0.0, loads={}, died=4)
    assert summary.drawn == summary.done
    assert (summary.asked, summary.skipped + summary.done) == (7, 7)
    assert summary.skipped > 0


def test_pictures_that_nobody_was_told_of_before_an_interruption_are_counted(plan: Plan, studio, tmp_path: Path):
    """A worker writes its pictures, and is stopped before this process reads of them."""
    out = tmp_path / "out"

    def tell(event: Stepped) -> None:
        while len(there(plan, out)) < 2:
            sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(draw_in_workers(jobs(plan, studio, out), Counter(), tell, lambda _: None))
    summary = summarise(plan, out, 0, {}, part=(1, 1), started=0.0, loads={}, died=0)
    assert 2 <= summary.drawn == summary.done == len(digests(out))
    before = there(plan, out)
    assert summarise(plan, out, 0, before, part=(1, 1), started=0.0, loads={}, died=0).drawn == 0


def test_the_command_on_two_devices(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd --s 0\n")
    command = ["batch", str(tmp_path / "prompts.txt"), "--model", str(ensemble_folder), "--batch-size", "1"]
    assert run([*command, "--out", str(tmp_path / "one"), "--device", "cpu"]) == 1
    assert run([*command, "--out", str(tmp_path / "two"), "--devices", "cpu,cpu"]) == 1
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "two")) == 3
    assert "4 asked: 3 done, 0 failed, 1 blocked as bad lines, 0 left; 3 drawn now" in capsys.readouterr().err
    for wrong in ("cpu,tpu", "cpu:1", "cpu,", ""):
        assert run([*command, "--out", str(tmp_path / "bad"), "--devices", wrong]) == 2
    assert run([*command, "--out", str(tmp_path / "bad"), "--devices", "cpu,cpu", "--device", "cpu"]) == 2


def test_numbered_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for wrong in ("cuda:2", "cuda:", "cuda:x", "cpu:0", "mps:0"):
        with pytest.raises(UsageError):
            choose_device(wrong)
