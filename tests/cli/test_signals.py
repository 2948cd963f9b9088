"""Interrupting a run: the right exit code, one sentence, finished pictures kept, nothing half written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(ensemble_folder: Path, tmp_path: Path, sent: signal.Signals, code: int):
    arguments = ["generate", "a", "--model", str(ensemble_folder), "--out", f"{tmp_path}/", "--count", "2000", "--steps", "30"]
    process = subprocess.Popen([sys.executable, "-m", "tu_diffuse", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline().strip()
    os.kill(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    assert error.count("tu-diffuse: ") == 1
    assert Path(first).is_file()
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in tmp_path.iterdir())
