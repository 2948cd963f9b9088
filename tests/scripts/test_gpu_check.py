"""The device check itself, tried on the CPU."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gpu_check
import pytest
import torch

OPTIONS = ["--device", "cpu", "--steps", "3", "--count", "2", "--rounds", "1", "--training-steps", "20", "--dtypes", "float32"]


def test_a_device_that_is_like_the_cpu_passes(tmp_path: Path):
    done = subprocess.run([sys.executable, gpu_check.__file__, "--out", str(tmp_path), *OPTIONS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = (tmp_path / "check.md").read_text()
    assert "_scaled_dot_product_flash_attention_for_cpu" in said
    assert "99% within 0 of 255" in said
    assert "8 pictures beside drawing" in said
    assert "differ by at most 0 from" in said


def main(tmp_path: Path, check: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *OPTIONS, "--only", check])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return ended.value.code


def test_pictures_that_are_far_off_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: Callable[..., list[torch.Tensor]] = gpu_check.pictures
    calls: list[int] = []

    def second_is_off(model: object, request: object) -> list[torch.Tensor]:
        calls.append(1)
        return [picture.flip(0) if len(calls) == 2 else picture for picture in drawn(model, request)]

    monkeypatch.setattr(gpu_check, "pictures", second_is_off)
    assert main(tmp_path, "pictures", monkeypatch) == 1
    assert "TOO FAR" in (tmp_path / "check.md").read_text()


def test_attention_that_no_fused_kernel_computes_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "kernels", lambda model, request: Counter({"aten::_scaled_dot_product_attention_math": 80}))
    assert main(tmp_path, "kernels", monkeypatch) == 1


def test_pictures_of_one_colour_prove_nothing():
    with pytest.raises(SystemExit, match="proves nothing"):
        gpu_check.apart([torch.zeros(4, 4, 3, dtype=torch.uint8)], [torch.zeros(4, 4, 3, dtype=torch.uint8)])
