"""GenEval's layout, read back as its evaluate_images.py does."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tu_diffuse.cli.main import run

# Lines as prompts/create_prompts.py of github.com/djghosh13/geneval (af4902f) makes them.
METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "teddy bear", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a teddy bear right of a dog",
    },
]
Generate = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def geneval(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run `batch --layout geneval` on lines; its exit code and events."""

    def call(lines: list[dict[str, Any]], *arguments: str, name: str = "evaluation_metadata.jsonl") -> tuple[int, list[dict[str, Any]]]:
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        command = ["batch", str(tmp_path / name), "--out", str(tmp_path / "out"), "--layout", "geneval", "--model", str(ensemble_folder), "--json"]
        code = run([*command, *arguments])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def seen_by_geneval(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Prompt folder -> (prompt, hash of pixels) of each picture, walked as GenEval's evaluator walks."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        with (folder / name / "metadata.jsonl").open() as file:
            metadata = json.load(file)
        assert metadata in METADATA
        found[name] = []
        for picture in sorted(os.listdir(folder / name / "samples")):
            if re.match(r"\d+\.png", picture):
                with Image.open(folder / name / "samples" / picture) as image:
                    found[name].append((metadata["prompt"], hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()))
    return found


def test_every_prompt_has_a_folder(geneval: Generate, tmp_path: Path):
    code, events = geneval(METADATA, "--count", "2")
    assert code == 0
    seen = seen_by_geneval(tmp_path / "out")
    assert {name: [prompt for prompt, _ in pictures] for name, pictures in seen.items()} == {
        f"{i:05d}": [line["prompt"]] * 2 for i, line in enumerate(METADATA)
    }
    assert len({pixels for pictures in seen.values() for _, pixels in pictures}) == 6
    assert events[-1]["asked"] == events[-1]["done"] == 6
    assert sorted(os.listdir(tmp_path / "out" / "00001" / "samples")) == ["00000.png", "00001.png"]

    # What is lost is drawn again, with the same pixels; what is there is kept.
    (tmp_path / "out" / "00001" / "samples" / "00001.png").unlink()
    code, events = geneval(METADATA, "--count", "2")
    assert (code, events[-1]["drawn"], events[-1]["done"]) == (0, 1, 6)
    assert seen_by_geneval(tmp_path / "out") == seen


def test_a_bad_line_keeps_its_number(geneval: Generate, tmp_path: Path):
    code, events = geneval([METADATA[0], METADATA[1] | {"name": "x"}, {"prompt": "no tag"}, METADATA[2] | {"tags": 1}, METADATA[2]])
    assert code == 1
    assert [event["line"] for event in events if event["event"] == "problem"] == [2, 3, 4]
    assert "no tag" in next(event["message"] for event in events if event["event"] == "problem" and event["line"] == 3)
    assert list(seen_by_geneval(tmp_path / "out")) == ["00000", "00004"]
    assert (events[-1]["asked"], events[-1]["done"], events[-1]["blocked"]) == (5, 2, 3)


def test_other_settings_need_another_folder(geneval: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert geneval(METADATA, "--seed", "1")[0] == 0
    seen = seen_by_geneval(tmp_path / "out")
    for changed, arguments in ((METADATA, ["--seed", "2"]), (METADATA[1:], ["--seed", "1"]), (METADATA[:2], ["--seed", "1"])):
        assert geneval(changed, *arguments)[0] == 2
        assert seen_by_geneval(tmp_path / "out") == seen
    code, events = geneval(METADATA, "--seed", "1")
    assert (code, events[-1]["drawn"], events[-1]["done"]) == (0, 0, 3)


def test_a_foreign_file_is_neither_replaced_nor_counted(geneval: Generate, tmp_path: Path):
    samples = tmp_path / "out" / "00000" / "samples"
    samples.mkdir(parents=True)
    (samples / "00000.png").write_bytes(b"mine")
    assert geneval(METADATA)[0] == 2
    assert (samples / "00000.png").read_bytes() == b"mine"
    (samples / "00000.png").unlink()
    (samples.parent / "metadata.jsonl").write_text("{}")
    assert geneval(METADATA)[0] == 2
    assert (samples.parent / "metadata.jsonl").read_text() == "{}"


def test_what_does_not_go_together(geneval: Generate):
    for arguments in (["--sweep", "guidance=1,3"], ["--name", "x"], ["--format", "webp"], ["--layout", "other"], ["--kind", "csv"]):
        assert geneval(METADATA, *arguments)[0] == 2


def test_a_plan_leads_nowhere_else(geneval: Generate, tmp_path: Path):
    assert geneval(METADATA)[0] == 0
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(plan.read_text().replace("00001/samples/00000.png", "../../elsewhere.png"))
    assert geneval(METADATA)[0] == 4
    assert not (tmp_path / "elsewhere.png").exists()


def test_replay_of_a_sample(geneval: Generate, tmp_path: Path, ensemble_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert geneval(METADATA, "--sampler", "euler_a")[0] == 0
    assert run(["replay", str(tmp_path / "out/00001/samples/00000.png"), "--model", str(ensemble_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]
