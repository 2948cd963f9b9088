"""`tu-diffuse batch` as a whole: every line accounted for, going on after whatever was lost, several processes on one folder."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tu_diffuse.batch.journal import read_journal
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.metadata import read_metadata
from whole_folders import digests, summary_of

Batch = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def batch(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    """Run `batch --json` on a text into tmp_path/out; its exit code and lines."""

    def call(text: str, *arguments: str, name: str = "prompts.txt", out: str = "out") -> tuple[int, list[dict[str, Any]]]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        code = run(["batch", str(tmp_path / name), "--out", str(tmp_path / out), "--model", str(ensemble_folder), "--json", *arguments])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


PROMPTS = "a\nb\nc\nd --s 3\ne\nf\ng\n"


def test_a_thousand_lines_with_fifty_bad_ones(batch: Batch, tmp_path: Path):
    bad = {n: ["x --w 33", "x --w nothing", "x --nope 1", "x --s 0", "\x00"][n % 5] for n in range(7, 1000, 20)}
    lines = [bad.get(n, f"picture {n} --s {2 + n % 2}") for n in range(1000)]
    code, events = batch("\n".join(lines))
    assert code == 1
    assert {event["line"] for event in events if event["event"] == "problem"} == {n + 1 for n in bad}
    assert len(bad) == 50
    assert len(digests(tmp_path / "out")) == 950
    assert len(set(digests(tmp_path / "out").values())) == 950
    counts = {name: summary_of(tmp_path / "out")[name] for name in ("asked", "done", "failed", "blocked", "skipped", "drawn")}
    assert counts == {"asked": 1000, "done": 950, "failed": 0, "blocked": 50, "skipped": 0, "drawn": 950}
    assert {event["line"] for event in events if event["event"] == "picture"} == {n + 1 for n in range(1000) if n not in bad}


def test_strict_stops_before_anything_is_made(batch: Batch, tmp_path: Path):
    code, events = batch("a\nb --w 33\nc --nope 3\n", "--strict")
    assert code == 4
    assert [(event["line"], event["column"]) for event in events] == [(2, 7), (3, 3)]
    assert not (tmp_path / "out").exists()


def test_again_draws_nothing(batch: Batch, tmp_path: Path):
    assert batch(PROMPTS)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.suffix == ".png"}
    code, events = batch(PROMPTS)
    assert code == 0
    assert not [event for event in events if event["event"] == "picture"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.suffix == ".png"} == before
    assert summary_of(tmp_path / "out")["drawn"] == 0


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_whatever_is_lost_is_drawn_with_the_same_pixels(batch: Batch, tmp_path: Path, size: int):
    assert batch(PROMPTS, "--batch-size", str(size))[0] == 0
    out = tmp_path / "out"
    before = digests(out)
    names = sorted(before)
    (out / names[1]).unlink()  # a picture without a file
    journal = (out / "journal.jsonl").read_text().splitlines()
    (out / "journal.jsonl").write_text("\n".join(journal[:4]) + "\n" + journal[4][:20])  # three without a line, one of them torn
    (out / "summary.json").unlink()
    code, events = batch(PROMPTS, "--batch-size", str(size))
    assert code == 0
    assert digests(out) == before
    drawn = [event for event in events if event["event"] == "picture"]
    assert len(drawn) == 1  # files whose line was lost carry their key, and are taken in again
    entries = read_journal(out)
    assert sorted(entry.file for entry in entries.values() if entry.file) == names
    assert summary_of(out)["done"] == 7


def test_unchanged_lines_of_a_changed_file_are_kept(batch: Batch, tmp_path: Path):
    batch(PROMPTS)
    before = digests(tmp_path / "out")
    code, events = batch(f"new\n{PROMPTS}".replace("c\n", "c --s 2\n"))
    assert code == 0
    assert sorted(event["line"] for event in events if event["event"] == "picture") == [1, 4]
    after = digests(tmp_path / "out")
    assert before.items() < after.items()
    assert len(after) == 9
    assert (summary_of(tmp_path / "out")["asked"], summary_of(tmp_path / "out")["done"]) == (8, 8)


def test_a_foreign_file_is_never_overwritten(batch: Batch, tmp_path: Path):
    (tmp_path / "out").mkdir()
    for name in ("00001-a-5.png", "00002-b-5.png"):
        (tmp_path / "out" / name).write_bytes(b"mine")
    assert batch("a --d 5\nb --d 5\n")[0] == 0
    assert (tmp_path / "out" / "00001-a-5.png").read_bytes() == b"mine"
    assert read_metadata(tmp_path / "out" / "00001-a-5-2.png")["prompt"] == "a"
    assert not [event for event in batch("a --d 5\nb --d 5\n")[1] if event["event"] == "picture"]


def test_expert_by_expert_when_memory_is_short(batch: Batch, tmp_path: Path):
    assert batch(PROMPTS, "--batch-size", "2", "--sampler", "euler_a")[0] == 0
    assert batch(PROMPTS, "--batch-size", "2", "--sampler", "euler_a", "--memory", "1e-4", out="short")[0] == 0
    assert digests(tmp_path / "short") == digests(tmp_path / "out")
    assert summary_of(tmp_path / "short")["loads"]["high"] >= 1
    assert not list((tmp_path / "short").glob(".parked-*"))


def test_parts_share_a_folder(batch: Batch, tmp_path: Path):
    whole = batch(PROMPTS, "--batch-size", "1", out="whole")
    assert whole[0] == 0
    for number in (3, 1, 2):
        code, _ = batch(PROMPTS, "--batch-size", "1", "--part", f"{number}/3")
        assert code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len({entry.key for entry in read_journal(tmp_path / "out").values()}) == 7
    assert summary_of(tmp_path / "out")["skipped"] == 0


def test_a_folder_is_held_by_one_process(batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").mkdir()
    for held, part in (("1-of-1", "1/1"), ("2-of-3", "2/3"), ("2-of-3", "1/1"), ("1-of-1", "2/3")):
        with FileLock(tmp_path / "out" / f".part-{held}.lock"):
            started = time.monotonic()
            assert batch("a", "--part", part)[0] == 2
            assert time.monotonic() - started < 5
    assert not list((tmp_path / "out").glob("*.png"))
    with FileLock(tmp_path / "out" / ".part-2-of-3.lock"):
        assert batch("a", "--part", "1/3")[0] == 0
    assert batch("a")[0] == 0


def test_a_killed_process_holds_nothing(batch: Batch, tmp_path: Path):
    (tmp_path / "out").mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tu_diffuse.batch.journal import only_run\n"
        "with only_run(Path(sys.argv[1]), (1, 1)):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert batch("a")[0] == 2
        holder.kill()
        holder.wait()
    assert batch("a")[0] == 0


def test_dry_run_writes_nothing_and_names_the_files(batch: Batch, tmp_path: Path):
    code, events = batch(PROMPTS, "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    expected = events[-1]
    assert (expected["pictures"], expected["missing"], expected["batches"], expected["loads"]) == (7, 7, 2, 4)
    assert expected["seconds"] > 0
    assert batch(PROMPTS)[0] == 0
    assert sorted(expected["names"]) == sorted(digests(tmp_path / "out"))
    again = batch(PROMPTS + "h\n", "--dry-run")[1][-1]
    assert (again["there"], again["missing"], again["source"]) == (7, 1, "the folder's last run")


def test_command_line_options_are_defaults_of_lines(batch: Batch, tmp_path: Path):
    code, events = batch(
        '{"prompt": "a", "steps": 2}\n{"prompt": "b"}\n',
        "--steps",
        "3",
        "--negative",
        "n",
        "--sweep",
        "guidance=1,4",
        "--count",
        "2",
        name="p.jsonl",
    )
    assert code == 0
    made = [read_metadata(Path(event["path"])) for event in events if event["event"] == "picture"]
    assert sorted((one["prompt"], one["steps"], one["guidance"]) for one in made) == sorted(
        (prompt, steps, guidance) for prompt, steps in (("a", 2), ("b", 3)) for guidance in (1.0, 4.0) for _ in range(2)
    )
    assert {one["negative"] for one in made} == {"n"}


def test_zero_is_a_value(batch: Batch):
    _, events = batch("a\n", "--seed", "0", "--guidance", "0")
    settings = read_metadata(Path(next(event["path"] for event in events if event["event"] == "picture")))
    assert (settings["seed"], settings["guidance"]) == (0, 0.0)


def test_csv_from_standard_input(ensemble_folder: Path, tmp_path: Path):
    code = "import sys; from tu_diffuse.cli.main import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "batch", "-", "--out", str(tmp_path / "out"), "--model", str(ensemble_folder)],
        input=b'prompt,steps,format\n"a, b",2,webp\nc,3,jpeg\n',
        capture_output=True,
        check=True,
    )
    paths = [Path(line) for line in done.stdout.decode().splitlines()]
    assert sorted(path.suffix for path in paths) == [".jpg", ".webp"]
    assert read_metadata(next(path for path in paths if path.suffix == ".webp"))["prompt"] == "a, b"


def test_one_lost_picture_is_told_and_tried_again(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tu_diffuse.vae.codec import LatentCodec

    decode, count = LatentCodec.decode, iter(range(100))

    def spoiled(self: LatentCodec, latents: Any) -> Any:
        return decode(self, latents * float("nan") if next(count) == 2 else latents)

    with monkeypatch.context() as patch:
        patch.setattr(LatentCodec, "decode", spoiled)
        code, events = batch(PROMPTS)
    assert code == 1
    failed = [event for event in events if event["event"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["error"]
    summary = summary_of(tmp_path / "out")
    assert (summary["done"], summary["failed"]) == (6, 1)
    assert batch(PROMPTS)[0] == 0
    assert batch(PROMPTS, out="whole")[0] == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("part", ["load_texts", "load_experts", "load_codec"])
def test_a_part_that_does_not_fit_is_one_sentence(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
):
    def full(*arguments: Any, **named: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"tu_diffuse.batch.studio.{part}", full)
        assert batch("a\nb\n")[0] == 1
    assert summary_of(tmp_path / "out")["done"] == 0
    assert batch("a\nb\n")[0] == 0
    assert summary_of(tmp_path / "out")["done"] == 2


def test_replay_finds_the_company(batch: Batch, tmp_path: Path, ensemble_folder: Path, capsys: pytest.CaptureFixture[str]):
    _, events = batch("a\nb --l 1\nc --n d\n", "--sampler", "euler_a")
    path = next(event["path"] for event in events if event["event"] == "picture" and event["line"] == 2)

    def replayed(path: str) -> dict[str, Any]:
        assert run(["replay", path, "--model", str(ensemble_folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert replayed(path)["equal"]
    (tmp_path / "out" / "plan.json").unlink()
    assert replayed(path)["largest_difference"] <= 2


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--sweep", "nope=1"], 2),
        (["--sweep", "guidance"], 2),
        (["--sweep", "guidance=a"], 2),
        (["--sweep", "seed=1,2"], 2),
        (["--sweep", "guidance=1", "--sweep", "guidance=2"], 2),
        (["--part", "4/3"], 2),
        (["--part", "x"], 2),
        (["--batch-size", "0"], 2),
        (["--memory", "0"], 2),
        (["--kind", "xml"], 2),
        (["--guidance", "nan"], 2),
        (["--sigmas", "1,2"], 2),
        (["--width", "0"], 2),
        (["--out", "/proc/none/here"], 74),
    ],
)
def test_bad_arguments(batch: Batch, capsys: pytest.CaptureFixture[str], arguments: list[str], exit_code: int):
    code, _ = batch("a\n", *arguments)
    assert code == exit_code


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (["batch"], ["batch", "p.txt"], ["batch", str(tmp_path / "none.txt"), "--out", str(tmp_path / "o")]):
        assert run(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert run(["batch", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
