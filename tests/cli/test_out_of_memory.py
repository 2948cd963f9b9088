"""Memory that runs out, as PyTorch's own allocator says it: one sentence and exit code 1, in any command."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shard_sets import members_of, write
from tu_diffuse.cli.main import run
from tu_diffuse.errors import DataError, out_of_memory

SENTENCE = "tu-diffuse: there is not enough memory; ask for smaller pictures, or a smaller --count.\n"


def refused(*arguments: object, **named: object) -> torch.Tensor:
    """What PyTorch raises when it is asked for more than any machine has."""
    return torch.empty(2**55, dtype=torch.uint8)


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def test_what_says_that_memory_ran_out():
    assert out_of_memory(raised(refused))
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("full"))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"))
    assert out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not out_of_memory(raised(lambda: torch.zeros(2) + torch.zeros(3)))
    assert not out_of_memory(DataError("line 3 says: out of memory"))


def test_generate_says_it_in_one_sentence(ensemble_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("tu_diffuse.vae.codec.LatentCodec.decode", refused)
    assert run(["generate", "a", "--model", str(ensemble_folder), "--steps", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err.endswith(SENTENCE)
    assert not any(tmp_path.iterdir())


def test_finetune_says_what_would_need_less(
    ensemble_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "00000.tar", members_of(4))
    monkeypatch.setattr("tu_diffuse.unet.unet.UNet.forward", refused)
    settings = ["--steps", "1", "--batch-size", "2", "--resolution", "32", "--device", "cpu"]
    assert run(["finetune", "--shards", str(tmp_path / "00000.tar"), "--model", str(ensemble_folder), "--out", str(tmp_path / "out"), *settings]) == 1
    assert capsys.readouterr().err.endswith("there is not enough memory; lower --batch-size, or add --gradient-checkpointing.\n")


def test_a_process_without_memory_says_it_in_one_sentence(ensemble_folder: Path, tmp_path: Path):
    """No allocator is replaced: the process may take 400 MiB more than it has after PyTorch was imported, and the pictures take gigabytes."""
    code = (
        "import resource, sys, torch, tu_diffuse.pipeline.text_to_image\n"
        "from tu_diffuse.cli.main import run\n"
        "torch.set_num_threads(1)\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20, -1))\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    large = ["--width", "4096", "--height", "4096", "--steps", "1", "--out", str(tmp_path / "a.png")]
    command = [sys.executable, "-c", code, "generate", "a", "--model", str(ensemble_folder), *large]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, SENTENCE)
    assert not any(tmp_path.iterdir())
