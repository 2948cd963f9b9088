"""Signals in the middle of a run, many processes on one folder, and long runs that do not grow."""

import json
import signal
from pathlib import Path

import pytest
from killed_runs import At, finish, start, told
from whole_folders import check_complete, digests, leftovers, summary_of


def command(model: Path, folder: Path, lines: str, *options: str, out: str = "out") -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text(lines)
    return ["batch", str(prompts), "--out", str(folder / out), "--model", str(model), "--steps", "2", "--device", "cpu", *options]


@pytest.fixture(scope="module")
def pixels(ensemble_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    finish(command(ensemble_folder, folder, LINES, "--batch-size", "3"), folder / "keys.jsonl")
    return digests(folder / "out")


LINES = "".join(f"picture {number}\n" for number in range(48))


AT = {
    130: At("os.link", r"\.png$", nth=4, signals=(signal.SIGINT,)),
    143: At("open", r"/\.journal\.jsonl\.lock$", nth=10, signals=(signal.SIGTERM,)),
}
TWICE = At("os.link", r"\.png$", nth=4, signals=(signal.SIGINT, signal.SIGINT))


@pytest.mark.parametrize("memory", ["1e-4", "4"])
@pytest.mark.parametrize(("code", "at"), [*AT.items(), (130, TWICE)])
def test_a_signal_stops_at_once_and_keeps_what_was_finished(
    ensemble_folder: Path, tmp_path: Path, pixels: dict[str, str], code: int, at: At, memory: str
) -> None:
    keys, out = tmp_path / "keys.jsonl", tmp_path / "out"
    arguments = command(ensemble_folder, tmp_path, LINES, "--batch-size", "3", "--memory", memory)
    process = start(arguments, keys, at)
    process.join(300)
    said = keys.with_suffix(".err").read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    assert said.count("tu-diffuse: ") == 1
    kept = digests(out)
    assert 3 <= len(kept) < 48
    assert kept.items() < pixels.items()
    for line in (out / "journal.jsonl").read_text().splitlines() if (out / "journal.jsonl").exists() else []:
        assert json.loads(line)["file"] in kept
    if at is not TWICE:
        summary = summary_of(out)
        assert (summary["asked"], summary["done"], summary["skipped"], summary["drawn"]) == (48, len(kept), 48 - len(kept), len(kept))
        assert said.count(".png\n") == len(kept)
        assert [name for name in leftovers(out) if not name.startswith(".parked-")] == []
    finish(arguments, keys)
    check_complete(out, pixels)


def four_at_once(commands: list[list[str]], folder: Path) -> None:
    processes = [start(arguments, folder / f"{number}.jsonl") for number, arguments in enumerate(commands)]
    for number, process in enumerate(processes):
        process.join(1200)
        assert process.exitcode == 0, (folder / f"{number}.err").read_text()


@pytest.mark.parametrize("each", [10, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["1e-4", "4"])
def test_four_parts_fill_one_folder(ensemble_folder: Path, tmp_path: Path, each: int, memory: str) -> None:
    lines = "".join(f"picture {number}\n" for number in range(4 * each))
    options = ("--batch-size", "2", "--memory", memory)
    four_at_once([command(ensemble_folder, tmp_path, lines, *options, "--part", f"{number}/4") for number in (1, 2, 3, 4)], tmp_path)
    finish(command(ensemble_folder, tmp_path, lines, "--batch-size", "2", out="whole"), tmp_path / "whole.jsonl")
    assert sum(line.get("rows", 0) for number in range(4) for line in told(tmp_path / f"{number}.jsonl")) == 4 * each * 2
    finish(command(ensemble_folder, tmp_path, lines, *options), tmp_path / "again.jsonl")
    assert told(tmp_path / "again.jsonl") == []
    check_complete(tmp_path / "out", digests(tmp_path / "whole"))
    assert len(set(digests(tmp_path / "out").values())) == 4 * each


@pytest.mark.parametrize("each", [8, pytest.param(250, marks=pytest.mark.slow)])
def test_four_runs_of_generate_fill_one_folder(ensemble_folder: Path, tmp_path: Path, each: int) -> None:
    common = [
        "generate",
        "a",
        "--model",
        str(ensemble_folder),
        "--out",
        f"{tmp_path / 'out'}/",
        "--count",
        str(each),
        "--steps",
        "1",
        "--name",
        "same",
    ]
    four_at_once([[*common, "--seed", str(1000 * number)] for number in range(4)], tmp_path)
    files = list((tmp_path / "out").glob("*.png"))
    assert len(files) == 4 * each
    assert len({path.read_bytes() for path in files}) == 4 * each
    assert leftovers(tmp_path / "out") == []


def check_steady(held: list[dict[str, int]], since: int) -> None:
    """From the picture `since` on, memory grows by less than 5 %; files, threads and processes are no more than they ever were before."""
    before, after = held[since // 2 : since], held[since:]
    for name in ("files", "threads", "children"):
        assert max(line[name] for line in after) <= max(line[name] for line in before), name
    assert max(line["memory"] for line in after) < 1.05 * before[-1]["memory"]


@pytest.mark.parametrize(("pictures", "since"), [(160, 60), pytest.param(2000, 200, marks=pytest.mark.slow)])
def test_a_long_run_does_not_grow(ensemble_folder: Path, tmp_path: Path, pictures: int, since: int) -> None:
    lines = "".join(f"picture {number}\n" for number in range(pictures))
    finish(command(ensemble_folder, tmp_path, lines, "--batch-size", "4"), tmp_path / "keys.jsonl")
    held = [line for line in told(tmp_path / "keys.jsonl") if "memory" in line]
    assert len(held) == pictures
    print(f"{held[since]['memory'] / 2**20:.1f} MiB after {since} pictures, {held[-1]['memory'] / 2**20:.1f} MiB after {pictures}; {held[-1]}")
    check_steady(held, since)
    for name in held[0]:
        leaking = [
            line | {name: line[name] + number * line["memory"] // 1000 if name == "memory" else line[name] + number}
            for number, line in enumerate(held)
        ]
        with pytest.raises(AssertionError):
            check_steady(leaking, since)
