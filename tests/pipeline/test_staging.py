"""Files are whole under their names, and nothing else is left beside them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tu_diffuse.pipeline.staging import write_file


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    left = tmp_path / ".lora.safetensors.partial"
    left.mkdir()
    (left / ".tmpWf8rs7").write_bytes(b"safetensors was writing here")
    (left / path.name).write_bytes(b"half")
    write_file(path, lambda unfinished: save_file({"a": torch.arange(3.0)}, unfinished))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert load_file(path)["a"].tolist() == [0, 1, 2]


def test_the_file_before_stays_whole_until_the_next_is(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    write_file(path, lambda unfinished: unfinished.write_text("first"))

    def fails(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_file(path, fails)
    assert path.read_text() == "first"
    write_file(path, lambda unfinished: unfinished.write_text("second"))
    assert path.read_text() == "second"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
