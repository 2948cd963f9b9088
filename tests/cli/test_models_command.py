"""`tu-diffuse models`."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tu_diffuse.cli.main import run


def test_info(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = shutil.copytree(ensemble_folder, tmp_path / "mine")
    (folder / "README.md").write_text('---\nlicense: other\ntags:\n- x\nlicense_name: "my-licence"  # ours\n---\n# Card\nlicense: not-this\n')
    assert run(["models", "info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    weights = list(folder.rglob("*.safetensors"))
    assert (facts["name"], facts["family"], facts["licence"]) == ("mine", "clip-t5", "my-licence")
    assert facts["parameters"] == sum(tensor.numel() for path in weights for tensor in load_file(path).values())
    assert facts["megabytes"] == pytest.approx(sum(path.stat().st_size for path in weights) / 1e6, abs=0.3)
    assert run(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
