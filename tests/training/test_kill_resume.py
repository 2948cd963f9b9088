"""Killed with SIGKILL and started again until done: the same bits as the run that nobody touched. The 200 kills are in the slow set."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic

import pytest
from killed_runs import At, check_a_checkpoint_is_left, finish, kill_after, kill_at, outcome, samples
from shard_sets import members_of, write

STEPS = 24


@dataclass(frozen=True)
class Whole:
    """The run that nobody touched."""

    model: Path
    shards: str
    out: Path
    keys: Path
    seconds: float

    def command(self, out: Path) -> list[str]:
        return command(self.model, self.shards, out)


def command(model: Path, shards: str, out: Path) -> list[str]:
    options = f"--steps {STEPS} --batch-size 2 --resolution 32 --lr 1e-3 --lora 2 --ema 0.9 --save-every 6 --validation-share 0.2 --validate-every 9"
    common = ["finetune", "--model", str(model), "--shards", shards, "--out", str(out)]
    return [*common, *options.split(), "--workers", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    shards = str(write(folder / "00000.tar", members_of(15)))
    out, keys = folder / "out", folder / "keys.jsonl"
    seconds = finish(command(sd1_folder, shards, out), keys)
    return Whole(sd1_folder, shards, out, keys, seconds)


def assert_same(whole: Whole, out: Path, keys: Path) -> None:
    ours, theirs = outcome(out), outcome(whole.out)
    assert ours.keys() == theirs.keys()
    assert [name for name, content in ours.items() if content != theirs[name]] == []
    assert samples(keys) == samples(whole.keys)


def test_the_untouched_run_is_one_worth_comparing_with(whole: Whole) -> None:
    names = outcome(whole.out).keys()
    for name in ("pytorch_lora_weights.safetensors", "model/unet/diffusion_pytorch_model.safetensors", "checkpoints/losses.jsonl"):
        assert name in names
    for name in ("model", "average", "optimizer"):
        assert f"checkpoints/checkpoint-{STEPS:08d}/{name}.safetensors" in names
    assert [json.loads(line)["step"] for line in (whole.out / "checkpoints" / "losses.jsonl").read_text().splitlines()] == [20, 24]
    assert [json.loads(line)["step"] for line in (whole.out / "validation" / "validation.jsonl").read_text().splitlines()] == [9, 18, 24]
    assert sorted(samples(whole.keys)) == list(range(STEPS))
    assert len({tuple(numbers) for numbers in samples(whole.keys).values()}) > STEPS / 2


POINTS = {  # each run is killed at one point after another, and is finished in the end
    "checkpoint": {
        "is begun": At("os.mkdir", "staged-00000006"),
        "has half of its weights": At("open", "staged-00000006/average", torn=True),
        "has half of its state": At("open", "staged-00000006/state.json", torn=True),
        "has no manifest": At("open", "staged-00000006/manifest.json"),
        "has half of its manifest": At("open", "staged-00000006/manifest.json", torn=True),
        "is written, not yet renamed": At("os.rename", "staged-00000006"),
        "is renamed, the old one still there": At("shutil.rmtree", "checkpoint-00000006"),
        "is there, the old one half deleted": At("os.remove", "state.json|average"),
        "is the last, not yet renamed": At("os.rename", "staged-00000024"),
    },
    "log": {
        "has half of its first line": At("open", r"(?<!partial)/losses.jsonl$", torn=True),
        "is not yet on the disk": At("open", r"(?<!partial)/losses.jsonl$", nth=2),
        "has half of its last line": At("open", r"(?<!partial)/losses.jsonl$", nth=4, torn=True),
        "is cut to a checkpoint on resuming, half written": At("open", r"losses.jsonl.partial/", torn=True),
        "is cut to a checkpoint on resuming, not yet renamed": At("os.rename", "losses.jsonl.partial"),
    },
    "validation": {
        "begins": At("os.mkdir", "validation$"),
        "has half of its first loss": At("open", r"validation.jsonl.partial/", torn=True),
        "has half of a later loss": At("open", r"validation.jsonl.partial/", nth=3, torn=True),
        "has a later loss, not yet renamed": At("os.rename", "validation.jsonl.partial"),
        "was due at the checkpoint and is half written": At("open", r"validation.jsonl.partial/", torn=True),
    },
    "result": {
        "has half of the LoRA file": At("open", r"pytorch_lora_weights.safetensors.partial/", torn=True),
        "has the LoRA file, not the model": At("os.mkdir", r"\.model\.\d+\.staged$"),
        "has half of the model": At("open", r"\.model\.\d+\.staged/model_index.json", torn=True),
        "is written, not yet renamed": At("os.rename", r"\.model\.\d+\.staged"),
        "is there, nobody was told": At("open", "out$", nth=2),
    },
}


@pytest.mark.parametrize("part", POINTS)
def test_killed_at_named_points_and_resumed(whole: Whole, tmp_path: Path, part: str) -> None:
    out, keys = tmp_path / "out", tmp_path / "keys.jsonl"
    for at in POINTS[part].values():
        kill_at(whole.command(out), keys, at)
        check_a_checkpoint_is_left(out)
    finish(whole.command(out), keys)
    assert_same(whole, out, keys)


def kill_at_random_moments(whole: Whole, folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill runs at moments spread evenly over the length of a run and start them again, each until it is done; counts what the kills left.

    How long a run takes is measured anew where one is not killed: the machine may be less busy than it was.
    """
    rng, seconds = random.Random(seed), whole.seconds
    seen: Counter[str] = Counter()
    for number in count():
        out, keys = folder / str(number), folder / f"{number}.jsonl"
        started: float | None = monotonic()
        while kill_after(whole.command(out), keys, rng.uniform(0, seconds)):
            step = check_a_checkpoint_is_left(out)
            staged = [path for path in out.rglob(".*") if path.name.endswith(("staged", "partial")) or path.name.startswith(".staged")]
            place = "before the first checkpoint" if step is None else f"after checkpoint {step}"
            seen[f"{place}, {'while a file was written' if staged else 'between files'}"] += 1
            started = None
        if started is not None:
            seconds = monotonic() - started
        assert_same(whole, out, keys)
        if seen.total() >= kills:
            return seen
    raise AssertionError


def test_killed_at_20_random_moments_and_resumed(whole: Whole, tmp_path: Path) -> None:
    seen = kill_at_random_moments(whole, tmp_path, kills=20, seed=20)
    assert len(seen) >= 3, seen  # they did not all hit the same phase


@pytest.mark.slow
def test_killed_at_200_random_moments_and_resumed(whole: Whole, tmp_path: Path) -> None:
    seen = kill_at_random_moments(whole, tmp_path, kills=200, seed=200)
    for where, times in sorted(seen.items()):
        print(f"{times:4} {where}")
    assert len(seen) >= 5, seen
