"""Killed with SIGKILL and started again until done: the pixels of the run that nobody touched. The 200 kills are in the slow set."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import sleep

import psutil
import pytest
from killed_runs import At, finish, kill_after, kill_at, start, told
from whole_folders import check_complete, digests, leftovers

STEPS = 2
SHORT = "--memory 1e-4"  # expert by expert, drafts are parked


@dataclass(frozen=True)
class Whole:
    """The run that nobody touched."""

    model: Path
    prompts: Path
    size: int
    pixels: dict[str, str]
    seconds: float

    def command(self, out: Path, memory: str = "") -> list[str]:
        options = f"--batch-size {self.size} --steps {STEPS} --sampler euler_a --device cpu {memory}"
        return ["batch", str(self.prompts), "--out", str(out), "--model", str(self.model), *options.split()]

    def most_rows(self, kills: int) -> int:
        """Most rows that may be denoised: those of the pictures, and at each kill those of a batch and of a step of the next."""
        return (len(self.pixels) + kills * self.size) * STEPS + kills * self.size


MakeWhole = Callable[[int, int], Whole]


@pytest.fixture(scope="module")
def whole(ensemble_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeWhole:
    made: dict[tuple[int, int], Whole] = {}

    def make(pictures: int, size: int) -> Whole:
        if (pictures, size) not in made:
            folder = tmp_path_factory.mktemp("whole")
            (folder / "prompts.txt").write_text("".join(f"picture {number}\n" for number in range(pictures)))
            run = Whole(ensemble_folder, folder / "prompts.txt", size, {}, 0)
            seconds = finish(run.command(folder / "out"), folder / "keys.jsonl")
            run = Whole(ensemble_folder, folder / "prompts.txt", size, digests(folder / "out"), seconds)
            check_complete(folder / "out", run.pixels)
            assert len(set(run.pixels.values())) == pictures
            assert rows(folder / "keys.jsonl") == pictures * STEPS
            made[pictures, size] = run
        return made[pictures, size]

    return make


def rows(keys: Path) -> int:
    return sum(line.get("rows", 0) for line in told(keys))


PARKING = {
    "a parked draft is half written": At("os.rename", r"\.parked-", torn=True),
    "a parked draft is written, not yet renamed": At("os.rename", r"\.parked-"),
    "a draft is taken up, the next is parked": At("os.rename", r"\.parked-", nth=2),
}
PICTURES = {
    "the plan is half written": At("os.rename", r"/plan\.json$", torn=True),
    "what the kill before left is swept": At("os.remove", r"\.batch-"),
    "the plan is written, not yet renamed": At("os.rename", r"/plan\.json$"),
    "the journal is there to be read, nothing is planned": At("open", r"/journal\.jsonl$"),
    "the plan is there, nothing is drawn": At("os.remove", r"\.batch-"),
    "a picture is half written": At("os.link", r"\.png$", torn=True),
    "a picture is written and has no name": At("os.link", r"\.png$", nth=2),
    "a picture has its name, the line is missing": At("open", r"/\.journal\.jsonl\.lock$", nth=2),
    "that picture is taken in on resuming": At("open", r"/\.journal\.jsonl\.lock$"),
    "its line is torn on resuming": At("open", r"/journal\.jsonl$", nth=2, torn=True),
    "a later line is torn": At("open", r"/journal\.jsonl$", nth=3, torn=True),
}
FORGETTING = {
    "a draft of finished pictures is to be removed": At("os.remove", r"\.parked-"),
    "it is to be removed on resuming": At("os.remove", r"\.parked-"),
}
END = {
    "the summary is half written": At("os.rename", r"/summary\.json$", torn=True),
    "the summary is written, not yet renamed": At("os.rename", r"/summary\.json$"),
    "the summary is there, nobody was told": At("os.remove", r"\.batch-.*", nth=3),  # of the sweep, the plan, the summary
}
POINTS = {"": PICTURES | END, SHORT: PARKING | PICTURES | FORGETTING | END}
CASES = [(1, ""), (2, SHORT), (4, SHORT), (7, "")]
MORE = [pytest.param(size, memory, marks=pytest.mark.slow) for size in (1, 2, 4, 7) for memory in POINTS if (size, memory) not in CASES]


@pytest.mark.parametrize(("size", "memory"), [*CASES, *MORE])
def test_killed_at_named_points_and_resumed(whole: MakeWhole, tmp_path: Path, size: int, memory: str) -> None:
    run, out, keys = whole(12, size), tmp_path / "out", tmp_path / "keys.jsonl"
    for what, at in POINTS[memory].items():
        print(what)
        kill_at(run.command(out, memory), keys, at)
        assert digests(out).items() <= run.pixels.items()
    finish(run.command(out, memory), keys)
    check_complete(out, run.pixels)
    assert rows(keys) <= run.most_rows(len(POINTS[memory]))


def test_killed_at_named_points_while_a_batch_is_decoded_beside_the_next(whole: MakeWhole, tmp_path: Path) -> None:
    run, out, keys = whole(12, 4), tmp_path / "out", tmp_path / "keys.jsonl"
    for what, at in POINTS[""].items():
        print(what)
        kill_at(run.command(out), keys, at, beside=True)
        assert digests(out).items() <= run.pixels.items()
    finish(run.command(out), keys, beside=True)
    check_complete(out, run.pixels)
    assert rows(keys) <= run.most_rows(len(POINTS[""]))


GENEVAL = {
    "a folder's line is half written": At("os.rename", r"/metadata\.jsonl$", nth=2, torn=True),
    "a folder's line is written, not yet renamed": At("os.rename", r"/metadata\.jsonl$"),
    "the best of a line is half written": At("os.link", r"\.png$", torn=True),
    "it has its name, the journal's line is missing": At("open", r"/\.journal\.jsonl\.lock$", nth=2),
    "it is taken in on resuming": At("open", r"/\.journal\.jsonl\.lock$"),
}


@pytest.mark.parametrize("memory", ["", pytest.param(SHORT, marks=pytest.mark.slow)])
def test_the_best_of_candidates_in_genevals_folders(ensemble_folder: Path, clip_folder: Path, tmp_path: Path, memory: str) -> None:
    lines, count, best_of = 2, 3, 2
    prompts, keys, size = tmp_path / "evaluation_metadata.jsonl", tmp_path / "keys.jsonl", 4
    prompts.write_text("".join(json.dumps({"prompt": f"picture {number}", "tag": "colors"}) + "\n" for number in range(lines)))
    options = f"--layout geneval --count {count} --best-of {best_of} --batch-size {size} --steps {STEPS} --sampler euler_a --device cpu {memory}"
    arguments = ["batch", str(prompts), "--model", str(ensemble_folder), "--score-model", str(clip_folder), *options.split(), "--out"]
    finish([*arguments, str(tmp_path / "whole")], tmp_path / "whole.jsonl")
    whole = digests(tmp_path / "whole")
    assert len(set(whole.values())) == lines * count
    points = GENEVAL | (PARKING if memory else {})
    for what, at in points.items():
        print(what)
        kill_at([*arguments, str(tmp_path / "out")], keys, at)
        assert digests(tmp_path / "out").items() <= whole.items()
    finish([*arguments, str(tmp_path / "out")], keys)
    check_complete(tmp_path / "out", whole)
    assert rows(keys) <= (lines * count * best_of + len(points) * size) * STEPS + len(points) * size


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_with_workers_on_two_devices(whole: MakeWhole, tmp_path: Path, kills: int) -> None:
    """The workers end with the process that started them, and the next one goes on where they stopped."""
    run, out, keys = whole(12 if kills == 1 else 200, 2), tmp_path / "out", tmp_path / "keys.jsonl"
    arguments = [part for part in run.command(out, "--devices cpu,cpu") if part not in ("--device", "cpu")]
    for kill in range(1, kills + 1):
        process = start(arguments, keys)
        while len(digests(out)) < min(kill * 12 // (kills + 1), 11) * len(run.pixels) // 12:
            assert process.is_alive(), keys.with_suffix(".err").read_text()
            sleep(0.02)
        workers = psutil.Process(process.pid).children()
        assert len([worker for worker in workers if "spawn_main" in " ".join(worker.cmdline())]) == 2
        process.kill()
        process.join(60)
        assert psutil.wait_procs(workers, timeout=60)[1] == []
        assert digests(out).items() <= run.pixels.items()
    finish(arguments, keys)
    check_complete(out, run.pixels)
    assert rows(keys) <= run.most_rows(2 * kills)


def where(out: Path) -> str:
    """What a kill left."""
    if not (out / "plan.json").exists():
        return "before the plan"
    left = leftovers(out)
    lines = (out / "journal.jsonl").read_bytes().count(b"\n") if (out / "journal.jsonl").exists() else 0
    if any(name.startswith(".batch-") for name in left):
        return "while a file was written"
    if len(digests(out)) > lines:
        return "between a picture and its line"
    if left:
        return "between files, with parked drafts"
    return "between files, before the first picture" if lines == 0 else "between files, after the first picture"


def kill_at_random_moments(run: Whole, memory: str, folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill runs at moments spread evenly and start them again, two or three times until they are done; counts what the kills left."""
    seen: Counter[str] = Counter()
    for number in count():
        out, keys, killed = folder / str(number), folder / f"{number}.jsonl", 0
        while seen.total() < kills and kill_after(run.command(out, memory), keys, rng.uniform(0, run.seconds * 0.8)):
            assert digests(out).items() <= run.pixels.items()
            seen[where(out)] += 1
            killed += 1
        finish(run.command(out, memory), keys)
        check_complete(out, run.pixels)
        assert rows(keys) <= run.most_rows(killed)
        if seen.total() >= kills:
            return seen
    raise AssertionError


@pytest.mark.parametrize(("size", "memory"), [(4, ""), (7, SHORT)])
def test_200_pictures_killed_at_10_random_moments_each(whole: MakeWhole, tmp_path: Path, size: int, memory: str) -> None:
    seen = kill_at_random_moments(whole(200, size), memory, tmp_path, kills=10, rng=random.Random(size))
    assert len(seen) >= 2, seen  # they did not all hit the same phase


@pytest.mark.slow
def test_200_pictures_killed_at_200_random_moments(whole: MakeWhole, tmp_path: Path) -> None:
    rng, seen = random.Random(200), Counter[str]()
    for size in (1, 2, 4, 7):
        for memory in POINTS:
            (tmp_path / f"{size}{memory}").mkdir()
            seen += kill_at_random_moments(whole(200, size), memory, tmp_path / f"{size}{memory}", kills=25, rng=rng)
    for what, times in sorted(seen.items()):
        print(f"{times:4} {what}")
    assert len(seen) >= 5, seen
