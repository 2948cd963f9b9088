"""The README's fine-tune example as a script, on few pictures."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "example_finetune.py"


def test_the_example_trains_draws_and_scores(tmp_path: Path):
    options = ["--samples", "16", "--count", "5", "--threads", "1", "--training", "--steps 2 --batch-size 4 --lora 2 --warmup 0 --lr 1e-2"]
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "adherence.json").read_text())
    assert scores["before"].keys() == scores["after"].keys() >= {"flag", "old prompts", "relation"}
    assert scores["before"]["flag"] == 0  # it has never seen one
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        rows = [sheet.convert("L").crop((0, top, sheet.width, top + 128)) for top in (30, 30 + 132)]
    assert rows[0].tobytes() != rows[1].tobytes()
