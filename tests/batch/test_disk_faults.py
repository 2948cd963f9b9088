"""Every write fails once, and from there on: no broken picture under its name, one sentence, and the same pixels once the disk is well."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from failing_disk import FAULTS, Disk, work_with_faults
from tu_diffuse.batch import scores, studio, workers
from tu_diffuse.cli.main import run
from whole_folders import check_complete, digests


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the model are loaded by the first run only."""

    def once(load: Callable[..., Any]) -> Callable[..., Any]:
        made: list[Any] = []

        def loaded(*arguments: Any, **named: Any) -> Any:
            if not made:
                made.append(load(*arguments, **named))
            return made[0]

        return loaded

    for name in ("load_texts", "load_experts", "load_codec"):
        monkeypatch.setattr(studio, name, once(getattr(studio, name)))
    monkeypatch.setattr(scores, "load_scorer", once(scores.load_scorer))


def command(model: Path, folder: Path, *options: str) -> list[str]:
    """Two pictures, `--out` left open."""
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt, "tag": "colors", "seed": 1}) + "\n" for prompt in "ab"))
    (folder / "p.txt").write_text("a\nb\n")
    return ["batch", str(folder / ("p.jsonl" if "geneval" in options else "p.txt")), "--model", str(model), "--steps", "2", *options]


def check_stopped(code: int, fault: str, lasts: bool, said: str, out: Path, whole: dict[str, str]) -> bool:
    """A run that met a fault says one sentence and leaves whole pictures only; returns whether it stopped."""
    sentences = [line for line in said.splitlines() if line.startswith("tu-diffuse:")]
    if fault == "short":
        assert code == 0
    elif lasts:
        assert code == 74, (fault, said)
    assert (code, len(sentences)) in ((0, 0), (74, 1)), (fault, said)
    assert "unexpected" not in said
    if out.exists():
        assert digests(out).items() <= whole.items()
    return code == 74


BEST = "--layout geneval --best-of 2 --score-model"
CASES = [
    ("", True),
    pytest.param("", False, marks=pytest.mark.slow),
    pytest.param("--memory 1e-4", True),
    pytest.param("--memory 1e-4", False, marks=pytest.mark.slow),
    pytest.param(BEST, True, marks=pytest.mark.slow),
    pytest.param(f"--memory 1e-4 {BEST}", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "in_turn"), CASES)
@pytest.mark.usefixtures("loaded_once")
def test_every_write_fails(
    ensemble_folder: Path,
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    in_turn: bool,
) -> None:
    """With `in_turn`, each place has one fault, which happens once or lasts; otherwise all of them both ways."""
    common = command(ensemble_folder, tmp_path, *options.split(), *([str(clip_folder)] if BEST in options else []))
    assert run([*common, "--out", str(tmp_path / "whole")]) == 0
    whole = digests(tmp_path / "whole")
    assert len(whole) == 2
    disk = Disk(tmp_path / "faulty", monkeypatch)
    assert run([*common, "--out", str(tmp_path / "faulty-not")]) == 0
    sites = disk.count
    assert sites > 30
    failed = 0
    for site in range(1, sites + 1):
        turn = [(FAULTS[site // 2 % 6], site % 2 == 0)]
        for fault, lasts in turn if in_turn else [(fault, lasts) for fault in FAULTS for lasts in (False, True)]:
            out = tmp_path / f"faulty-{site}-{fault}-{lasts}"
            capsys.readouterr()
            disk.fails(site, lasts, fault)
            code = run([*common, "--out", str(out)])
            failed += check_stopped(code, fault, lasts, capsys.readouterr().err, out, whole)
            disk.fails(0, False, "")
            assert run([*common, "--out", str(out)]) == 0
            check_complete(out, whole)
    assert failed > sites / 2


@pytest.mark.slow
def test_writes_of_workers_fail(ensemble_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    common = command(ensemble_folder, tmp_path, "--batch-size", "1", "--devices", "cpu,cpu")
    assert run([*common, "--out", str(tmp_path / "whole")]) == 0
    whole = digests(tmp_path / "whole")
    for site, fault, lasts in ((2, "ENOSPC", True), (7, "EIO", True), (5, "short", False)):
        out = tmp_path / f"faulty-{site}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_work", partial(work_with_faults, first=site, lasting=lasts, fault=fault))
            code = run([*common, "--out", str(out)])
        assert check_stopped(code, fault, lasts, capsys.readouterr().err, out, whole) == lasts
        assert run([*common, "--out", str(out)]) == 0
        check_complete(out, whole)
