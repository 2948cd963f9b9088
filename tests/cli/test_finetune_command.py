"""`tu-diffuse finetune` as people run it: killed, terminated, resumed, configured by file, and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tu_diffuse.cli.main import run
from tu_diffuse.training.checkpoints import load_newest
from world import STAGES
from write_shards import write_shard

COMMON = ["--batch-size", "4", "--resolution", "32", "--lr", "1e-3", "--save-every", "2", "--threads", "1", "--device", "cpu"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_shard(folder, number, 12, STAGES["shapes"], 5, "png")
    return f"{folder}/{{00000..00001}}.tar"


def command(model: Path, shards: str, out: Path, *more: str) -> list[str]:
    return ["finetune", "--model", str(model), "--shards", shards, "--out", str(out), *COMMON, *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tu_diffuse", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def wait_for(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob(f"checkpoint-{step:08d}")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def result(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_the_same_command_gives_the_same_bits(sd1_folder: Path, shards: str, tmp_path: Path, number: signal.Signals) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(command(sd1_folder, shards, whole, "--steps", "40", "--lora", "4")) == 0
    process = start(command(sd1_folder, shards, cut, "--steps", "40", "--lora", "4"))
    wait_for(cut, 6, process)
    process.send_signal(number)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number, errors
        assert time.monotonic() - sent < 5
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    found = load_newest(cut / "checkpoints")
    assert found is not None
    assert 6 <= found.step < 40
    assert run(command(sd1_folder, shards, cut, "--steps", "40", "--lora", "4")) == 0
    one, other = result(whole), result(cut)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert (whole / "checkpoints" / "losses.jsonl").read_text() == (cut / "checkpoints" / "losses.jsonl").read_text()


def test_a_config_file_equals_the_flags_and_flags_win(sd1_folder: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'shards = ["{shards}"]\nsteps = 9\nbatch-size = 4\nresolution = 32\nlr = 1e-3\nsave_every = 2\nthreads = 1\nlora = 4\nprompts = ["a star"]\n'
    )
    arguments = ["finetune", "--model", str(sd1_folder), "--out", str(tmp_path / "a"), "--config", str(file), "--steps", "4"]
    assert run([*arguments, "--json", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["plan", "step", "validation", "done"]
    assert lines[2]["pictures"] == {"a star": str(tmp_path / "a" / "validation" / "step000004-0.png")}
    assert lines[0]["options"]["steps"] == 4
    assert lines[0]["options"]["lora"] == 4
    assert lines[0]["samples"] == 24
    assert lines[1]["images_per_second"] > 0
    assert lines[3]["model"] == str(tmp_path / "a" / "model")
    assert (tmp_path / "a" / "validation" / "step000004-0.png").stat().st_size > 100
    assert "a star" in (tmp_path / "a" / "report.html").read_text()
    assert run(command(sd1_folder, shards, tmp_path / "b", "--steps", "4", "--lora", "4")) == 0
    one, other = result(tmp_path / "a"), result(tmp_path / "b")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_dry_run_measures_and_writes_nothing(sd1_folder: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command(sd1_folder, shards, tmp_path / "out", "--steps", "500"), "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "24 samples" in told
    assert "s a step" in told
    assert "MiB" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["--steps", "0"], 2, "--steps 0"),
        (["--steps", "4", "--lr", "-1"], 2, "--lr"),
        (["--steps", "4", "--lr", "nan"], 2, "finite"),
        (["--steps", "4", "--caption-dropout", "1.5"], 2, "--caption-dropout"),
        (["--steps", "4", "--precision", "int8"], 2, "float32, bfloat16, float16"),
        (["--steps", "4", "--lr-schedule", "constant", "--cooldown", "2"], 2, "--lr-schedule constant"),
        (["--steps", "4", "--optimizer", "prodigy"], 2, "prodigy"),
        (["--steps", "4", "--resume"], 2, "no checkpoint to resume"),
        (["--steps", "4", "--track", "paper"], 2, "tensorboard"),
        (["--steps", "4", "--zero-terminal-snr"], 2, "predicts the noise"),
        (["--steps", "4", "--zero-terminal-snr", "--min-snr", "5"], 2, "--min-snr"),
        (["--steps", "4", "--optimizer", "sgd"], 2, "adamw8bit"),
        (["--steps", "4", "--format", "kohya"], 2, "--lora"),
        (["--steps", "4", "--warmup", "5"], 2, "--warmup"),
        (["--steps", "4", "--expert", "low"], 2, "low"),
        (["--steps", "4", "--validate-every", "2"], 2, "nothing to do"),
        (["--steps", "4", "--shards", "absent.tar"], 2, "absent.tar"),
        (["--steps", "4", "--shards", "pipe:cat x.tar"], 3, "pipe"),
        ([], 2, "--steps is missing"),
    ],
)
def test_bad_options_are_one_sentence_and_nothing_is_written(
    sd1_folder: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], code: int, words: str
) -> None:
    assert run(command(sd1_folder, shards, tmp_path / "out", *extra)) == code
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("tu-diffuse: ")
    assert words in told
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("content", ["stepz = 4\n", "steps = \n", 'steps = "4"\n', "steps = 4\nlora = true\n", 'lr = "fast"\nsteps = 4\n'])
def test_a_config_file_with_a_mistake_is_refused(
    sd1_folder: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "run.toml").write_text(content)
    arguments = ["finetune", "--model", str(sd1_folder), "--shards", shards, "--out", str(tmp_path / "out")]
    assert run([*arguments, "--config", str(tmp_path / "run.toml")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_filters_leave_samples_out_and_are_counted(sd1_folder: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command(sd1_folder, shards, tmp_path / "out", "--steps", "1"), "--json"]
    assert run([*arguments, "--min-size", "200"]) == 2  # the pictures are 128 pixels wide
    assert "0 samples are left" in capsys.readouterr().err
    assert run([*arguments, "--min-size", "100", "--aspect", "0.5,2"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[0])
    assert plan["samples"] == 24
    assert plan["options"]["min_size"] == 100
    assert run([*arguments, "--filter", "laion-aesthetic"]) == 4
    assert "No sample has a column" in capsys.readouterr().err


def test_a_damaged_shard_stops_before_training(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_shard(tmp_path, 0, 12, STAGES["shapes"], 5, "png")
    data = bytearray(path.read_bytes())
    data[data.index(b".png", 2000) + 1] ^= 4  # a letter of a member's name: the header's checksum is wrong
    path.write_bytes(data)
    assert run(command(sd1_folder, str(path), tmp_path / "out", "--steps", "4")) == 4
    assert "byte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ACCELERATE = "accelerate.commands.launch --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port 0"


@pytest.mark.parametrize(
    ("launch", "more"),
    [
        (f"{ACCELERATE} --use_fsdp", []),
        pytest.param(f"{ACCELERATE} --cpu", [], marks=pytest.mark.slow),
        pytest.param("torch.distributed.run --standalone --nproc-per-node 2", ["--sharded"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_with_the_whole_batch(sd2_folder: Path, shards: str, tmp_path: Path, launch: str, more: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(sd2_folder, shards, one, "--steps", "6")) == 0
    arguments = [sys.executable, "-m", *launch.split(), "-m", "tu_diffuse", *command(sd2_folder, shards, two, "--steps", "6", "--json", *more)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in told] == ["plan", "step", "done"]
    assert told[0]["options"]["sharded"] == ("--cpu" not in launch)
    losses = [json.loads((out / "checkpoints" / "losses.jsonl").read_text())["loss"] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    first, second = result(one), result(two)
    apart = {name: (tensor - second[name]).abs() for name, tensor in first.items()}
    assert max(float(tensor.mean()) for tensor in apart.values()) < 1e-5
    assert max(float(tensor.max()) for tensor in apart.values()) < 2e-3  # AdamW makes whole steps of gradients that are rounding errors alone
